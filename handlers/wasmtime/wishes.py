"""What annotations ask of a module: ports to listen on, and how it is stopped. Pure; placement has a file of its own.

The nearest word counts: see `asked`. Invariant: what is asked for is given or refused by name.
"""

from __future__ import annotations

from cri_shim.model.errors import InvalidArgument, Unimplemented
from cri_shim.model.handler import ContainerPlan
from cri_shim.spec.dispatch import LISTEN_ANNOTATION, STOP_ANNOTATION

_PORTS = range(1, 1 << 16)
_MOST = 64


def ports(plan: ContainerPlan, *, component: bool) -> tuple[int, ...]:
    """TCP ports, in the order of their descriptors. InvalidArgument for what is no list of ports."""
    text = asked(plan, LISTEN_ANNOTATION)[0] or _of_image(plan, LISTEN_ANNOTATION)
    if not text:
        return ()
    if component:
        msg = f"annotation {LISTEN_ANNOTATION}: a component has no descriptors to be given"
        raise Unimplemented(msg)
    words = [word.strip() for word in text.split(",")]
    found = tuple(int(word) for word in words if word.isascii() and word.isdigit() and int(word) in _PORTS)
    if len(found) != len(words) or len(set(found)) != len(found) or len(found) > _MOST:
        msg = f"annotation {LISTEN_ANNOTATION}: {text[:100]!r} is not a list of at most {_MOST} different TCP ports"
        raise InvalidArgument(msg, hint="for example 8080 or 8080,9090")
    return found


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
