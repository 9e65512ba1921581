"""What annotations ask of a module: ports to listen on, and how it is stopped. Pure; placement has a file of its own.

The nearest word counts: see `asked`. Invariant: what is asked for is given or refused by name.
"""

from __future__ import annotations

import re

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import ContainerPlan
from cri_shim.spec.dispatch import LISTEN_ANNOTATION, STOP_ANNOTATION
from handlers.wasmtime.guest_spec import Http

_PORTS = range(1, 1 << 16)
_MOST = 64
_HTTP_PORT = 8080
_HTTP_VARIABLE = "WASMTIME_HTTP_PROXY_SOCKET_ADDR"
"""As with runwasi."""
_SOCKET_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})")


def ports(plan: ContainerPlan) -> tuple[int, ...]:
    """TCP ports, in the order of their descriptors. InvalidArgument for what is no list of ports."""
    text = asked(plan, LISTEN_ANNOTATION)[0] or _of_image(plan, LISTEN_ANNOTATION)
    if not text:
        return ()
    words = [word.strip() for word in text.split(",")]
    found = tuple(int(word) for word in words if word.isascii() and word.isdigit() and int(word) in _PORTS)
    if len(found) != len(words) or len(set(found)) != len(found) or len(found) > _MOST:
        msg = f"annotation {LISTEN_ANNOTATION}: {text[:100]!r} is not a list of at most {_MOST} different TCP ports"
        raise InvalidArgument(msg, hint="for example 8080 or 8080,9090")
    return found


def http(plan: ContainerPlan) -> Http:
    """Where a component serves HTTP, if it does: the annotation's ports, else the variable's address, else 8080."""
    if wanted := ports(plan):
        return Http(tuple(("", port) for port in wanted), asked=True)
    values = dict(item.partition("=")[::2] for item in plan.process.env)
    text = values.get(_HTTP_VARIABLE)
    if not text:
        return Http((("", _HTTP_PORT),), asked=False)
    found = _SOCKET_ADDRESS.fullmatch(text)
    if found is None or int(found[3]) not in _PORTS:
        msg = f"variable {_HTTP_VARIABLE}: {text[:100]!r} is not an address and a port"
        raise InvalidArgument(msg, hint="for example 0.0.0.0:8080 or [::]:8080")
    return Http(((found[1] or found[2], int(found[3])),), asked=False)


def graceful(plan: ContainerPlan) -> bool:
    """Whether stopping leaves the end to the module."""
    return asked(plan, STOP_ANNOTATION)[0] == "graceful"


def asked(plan: ContainerPlan, key: str) -> tuple[str, str]:
    """What an annotation says and whose it is: the container's own, the pod's for this container, the pod's for all."""
    of_pod = plan.pod.config.annotations
    for whose, said, name in (
        ("container", plan.config.annotations, key),
        ("pod", of_pod, f"{key}.{plan.config.metadata.name}"),
        ("pod", of_pod, key),
    ):
        if value := said.get(name):
            return value, f"the {whose}'s annotation {name}"
    return "", ""


def _of_image(plan: ContainerPlan, key: str) -> str:
    if plan.image is None:
        return ""
    return plan.image.annotations.get(key) or plan.image.config.labels.get(key, "")
