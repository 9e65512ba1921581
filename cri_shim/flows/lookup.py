"""Finding pods and containers as clients name them: a full id, or a prefix that fits only one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, TypeVar

from cri_shim.adapters.store import Store
from cri_shim.model.container import ContainerRecord, ContainerState
from cri_shim.model.errors import InvalidArgument, NotFound, WrongState
from cri_shim.model.ids import SHORT, ContainerId, PodId
from cri_shim.model.pod import PodRecord, PodState

_PREFIX = re.compile(r"[0-9a-f]{1,64}")


class _Identified(Protocol):
    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=_Identified)


def find_pod(store: Store, text: str) -> PodRecord | None:
    """A pod that clients can see, or None. Raises InvalidArgument for empty and ambiguous ids."""
    exact = store.pods.get(PodId(text))
    if exact is not None and exact.state is not PodState.PENDING:
        return exact  # as the kubelet names them; it has hundreds
    return _find((pod for pod in store.pods.values() if pod.state is not PodState.PENDING), text, "pod sandbox")


def find_container(store: Store, text: str) -> ContainerRecord | None:
    """A container that clients can see, or None. Raises InvalidArgument for empty and ambiguous ids."""
    exact = store.containers.get(ContainerId(text))
    if exact is not None and is_visible(exact):
        return exact
    return _find(visible_containers(store), text, "container")


def existing_pod(store: Store, text: str) -> PodRecord:
    """As `find_pod`, but NotFound for None."""
    pod = find_pod(store, text)
    if pod is None:
        msg = f"pod sandbox {text[:64]!r} does not exist"
        raise NotFound(msg)
    return pod


def existing_container(store: Store, text: str) -> ContainerRecord:
    """As `find_container`, but NotFound for None."""
    container = find_container(store, text)
    if container is None:
        msg = f"container {text[:64]!r} does not exist"
        raise NotFound(msg)
    return container


def running_container(store: Store, text: str) -> ContainerRecord:
    """As `existing_container`, but WrongState for one that does not run."""
    container = existing_container(store, text)
    if container.state is not ContainerState.RUNNING:
        msg = f"container {container.id[:SHORT]} is {container.state.value}, not running"
        raise WrongState(msg)
    return container


def visible_containers(store: Store) -> Iterable[ContainerRecord]:
    """All but those that are still being made, and the pods' own."""
    return (c for c in store.containers.values() if is_visible(c))


def is_visible(container: ContainerRecord) -> bool:
    """Not one that is still being made, nor a pod's own."""
    return container.state is not ContainerState.PENDING and not container.infra


def _find(records: Iterable[R], text: str, what: str) -> R | None:
    if not text:
        msg = f"the {what} id is empty"
        raise InvalidArgument(msg)
    if _PREFIX.fullmatch(text) is None:
        return None
    found = [record for record in records if record.key.startswith(text)]
    if len(found) > 1:
        msg = f"{what} id {text!r} is ambiguous, it fits {len(found)} of them"
        raise InvalidArgument(msg, hint="give more characters of the id")
    return found[0] if found else None
