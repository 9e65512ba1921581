"""What annotations ask of a module: ports to listen on, and how it is stopped. Pure; placement has a file of its own.

The container's annotations go before the pod's. Invariant: what is asked for is given or refused by name.
"""

from __future__ import annotations

from cri_shim.model.errors import InvalidArgument, Unimplemented
from cri_shim.model.handler import ContainerPlan
from cri_shim.spec.dispatch import LISTEN_ANNOTATION, STOP_ANNOTATION

_PORTS = range(1, 1 << 16)
_MOST = 64


def ports(plan: ContainerPlan, *, component: bool) -> tuple[int, ...]:
    """TCP ports, in the order of their descriptors. InvalidArgument for what is no list of ports."""
    text = _annotation(plan, LISTEN_ANNOTATION)
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
    return _annotation(plan, STOP_ANNOTATION) == "graceful"


def _annotation(plan: ContainerPlan, key: str) -> str:
    return plan.config.annotations.get(key) or plan.pod.config.annotations.get(key, "")
