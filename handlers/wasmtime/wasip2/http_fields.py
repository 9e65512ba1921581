"""`fields` of `wasi:http/types`: headers and trailers, with the rules on their names and values.

Not on the wire (`cri_shim.wire.http1`). Invariant: what is in a `Fields` may be sent as it is: names are tokens in
lower case, values have no line breaks, and none of them is a matter of the connection alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from handlers.wasmtime.wasip2.interface import Failure, methods
from handlers.wasmtime.wasip2.resources import Resource

FORBIDDEN: Final = frozenset(
    {
        *("connection", "host", "http2-settings", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "transfer-encoding", "upgrade"),
    }
)
"""Matters of the connection: a component neither sees nor sets them. The same as in the engine's own implementation."""
_NAME: Final = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

Entries = tuple[tuple[str, bytes], ...]


class Fields(Resource, resource=True):
    """`fields`. Frozen ones belong to a message that has come, or is about to be sent."""

    def __init__(self, entries: Iterable[tuple[str, bytes]] = (), *, frozen: bool = False) -> None:
        """Of entries that are known to be good."""
        self._entries = list(entries)
        self._frozen = frozen

    @property
    def entries_now(self) -> Entries:
        """All of them."""
        return tuple(self._entries)

    def value(self, name: str) -> bytes | None:
        """The first one's of this name, in lower case."""
        return next((value for key, value in self._entries if key == name), None)

    def freeze(self) -> Fields:
        """From now on nobody changes it."""
        self._frozen = True
        return self

    @staticmethod
    def from_list(entries: list[tuple[str, bytes]]) -> Fields:
        """`fields.from-list`."""
        return Fields((_name(name), _value(value)) for name, value in entries)

    def get(self, name: str) -> list[bytes]:
        """`fields.get`."""
        wanted = name.lower()
        return [value for key, value in self._entries if key == wanted]

    def has(self, name: str) -> bool:
        """`fields.has`."""
        return self.value(name.lower()) is not None

    def set(self, name: str, values: list[bytes]) -> None:
        """`fields.set`."""
        self._must_change()
        key, checked = _name(name), [_value(value) for value in values]
        self._remove(key)
        self._entries += ((key, value) for value in checked)

    def delete(self, name: str) -> None:
        """`fields.delete`."""
        self._must_change()
        self._remove(_name(name))

    def append(self, name: str, value: bytes) -> None:
        """`fields.append`."""
        self._must_change()
        self._entries.append((_name(name), _value(value)))

    def entries(self) -> list[tuple[str, bytes]]:
        """`fields.entries`."""
        return list(self._entries)

    def clone(self) -> Fields:
        """`fields.clone`."""
        return Fields(self._entries)

    def _must_change(self) -> None:
        if self._frozen:
            raise Failure(("immutable", None))

    def _remove(self, key: str) -> None:
        self._entries = [entry for entry in self._entries if entry[0] != key]


FUNCTIONS: Final = {
    "[constructor]fields": Fields,
    "[static]fields.from-list": Fields.from_list,
    **methods("fields", Fields, "get", "has", "set", "delete", "append", "entries", "clone"),
}


def visible(headers: Iterable[tuple[str, bytes]]) -> Fields:
    """Those of a message that has come which are for the component."""
    return Fields((entry for entry in headers if entry[0] not in FORBIDDEN), frozen=True)


def _name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise Failure(("invalid-syntax", None))
    key = name.lower()
    if key in FORBIDDEN:
        raise Failure(("forbidden", None))
    return key


def _value(value: bytes) -> bytes:
    if _VALUE.fullmatch(value) is None:
        raise Failure(("invalid-syntax", None))
    return value
