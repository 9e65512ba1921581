"""List entries, made once per version of a record: the kubelet lists everything every second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class _Keyed(Protocol):
    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=_Keyed)
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Listed(Generic[M]):
    """An entry of a list."""

    message: M
    alone: bytes
    """The encoded response that has this entry only. Such in a row are the response with all of them, as protobuf's
    encoding has it, and are read in a third of the time that making it of the messages takes."""


@dataclass(slots=True)
class Entries(Generic[R, M]):
    """Messages by record. Records are immutable, so the same object always means the same message."""

    make: Callable[[R], M]
    _known: dict[str, tuple[R, M]] = field(default_factory=dict)

    def of(self, records: Iterable[R]) -> list[M]:
        """The entries of these records, which are all that there are; what is not among them is forgotten."""
        self._known = {record.key: self._entry(record) for record in records}
        return [message for _, message in self._known.values()]

    def _entry(self, record: R) -> tuple[R, M]:
        known = self._known.get(record.key)
        return known if known is not None and known[0] is record else (record, self.make(record))
