"""Letting a Wasm module note that it was refused to grow, which the engine tells nobody.

    memory.grow, table.grow ──▶ call of a function that does it, and writes into a global what was refused

Functions, global, types and exports are put behind those of the module, so that no number in it changes. What the
note says: bytes that were wanted and not got; 0 again when at least half as much has been got since, as by those who
try less and less. What the module's own maximum refuses is not noted. A start function is exported instead, to be
called first: of an instance that it ends before there is one, nothing can be read.

Not for what is no valid module: the engine is to say so first. Sans-IO. Invariant: a module does what it did before.
Source: WebAssembly Core Specification 3.0, "Binary Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cri_shim.wire.wasm_addresses import Addresses
from cri_shim.wire.wasm_binary import HEADER, Limits, Reader, leb, sized
from cri_shim.wire.wasm_code import END, MEMORY_GROW, TABLE_GROW, skip_expression, skip_instruction, skip_locals
from cri_shim.wire.wasm_grower import NOTE, Grower, call, grows_memory, grows_table

VERSION: Final = 2
"""Of what is made here, for those who keep it."""

_TYPES, _IMPORTS, _FUNCTIONS, _TABLES, _MEMORIES, _GLOBALS, _EXPORTS, _START, _CODE = 1, 2, 3, 4, 5, 6, 7, 8, 10
_ORDER: Final = {kind: place for place, kind in enumerate((1, 2, 3, 4, 5, 13, 6, 7, 8, 9, 12, 10, 11))}
"""Of the sections; custom ones, which have none, may be anywhere."""
_FUNCTION, _TABLE, _MEMORY, _GLOBAL, _TAG = range(5)
"""Kinds of imports and exports."""
_GROWTHS: Final = re.compile(rb"\x40\x00|\xfc\x0f")
"""How the instructions are written; most code that has these bytes means something else."""
_MOST_SITES: Final = 1000


def note_refusals(module: bytes, name: str, start: str) -> bytes | None:
    """The module that notes, or None: nothing in it grows, or it has something that is not known here.

    The global is exported, after all that the module exports, by the name, a space and its `Addresses`; in front of it
    by `start` the start function, if there is one. The names must be none that are in the module.
    """
    try:
        found = _read(module)
        return _rewritten(found, name, start) if found.sites else None
    except (LookupError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class _Site:
    """An instruction that grows the memory, or a table."""

    at: int
    end: int
    table: int | None


@dataclass(frozen=True, slots=True)
class _Body:
    """A function that grows something: where its size is said, where it begins and ends."""

    size_at: int
    at: int
    end: int
    sites: tuple[_Site, ...]


@dataclass(frozen=True, slots=True)
class _Table:
    element: bytes
    limits: Limits


@dataclass(slots=True)
class _Module:
    """What the rewriting has to know."""

    data: bytes
    sections: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Kind; where it begins, where its content does, and where that ends."""
    imported: list[int] = field(default_factory=lambda: [0] * 5)
    """How many, by kind."""
    counts: dict[int, int] = field(default_factory=dict)
    """Entries of sections."""
    start: int | None = None
    memory: Limits | None = None
    tables: list[_Table] = field(default_factory=list)
    bodies: list[_Body] = field(default_factory=list)
    sites: int = 0


def _read(data: bytes) -> _Module:
    module, reader = _Module(data), Reader(data, HEADER)
    while reader.at < len(data):
        begin = reader.at
        kind, content = reader.section()
        module.sections.append((kind, begin, content.at, content.end))
        if kind == _IMPORTS:
            _read_imports(module, content)
        elif kind == _TABLES:
            module.tables = [_table(data, content) for _ in range(content.number())]
        elif kind == _MEMORIES:
            module.memory = content.limits() if content.number() else None
        elif kind == _START:
            module.start = content.number()
        elif kind == _CODE:
            module.counts[kind] = content.number()
            module.bodies = list(_bodies(data, content, module.counts[kind]))
            module.sites = sum(len(body.sites) for body in module.bodies)
        elif kind in {_FUNCTIONS, _GLOBALS, _EXPORTS}:
            module.counts[kind] = content.number()
    if module.sites > _MOST_SITES or module.imported[_TABLE] or module.imported[_MEMORY]:
        raise ValueError(module.sites)
    if module.sites:
        module.counts[_TYPES] = sum(1 for content in _contents(module, _TYPES) for _ in content.types())
    return module


def _contents(module: _Module, wanted: int) -> Iterator[Reader]:
    return (Reader(module.data, at, end) for kind, _, at, end in module.sections if kind == wanted)


def _read_imports(module: _Module, content: Reader) -> None:
    for _ in range(content.number()):
        for _ in ("module", "name"):
            size = content.number()
            content.at += size
        kind = content.byte()
        if kind == _FUNCTION:
            content.number()
        elif kind == _TABLE:
            content.value_type()
            content.limits()
        elif kind == _MEMORY:
            content.limits()
        elif kind == _GLOBAL:
            content.value_type()
            content.byte()
        elif kind == _TAG:
            content.byte()
            content.number()
        module.imported[kind] += 1


def _table(data: bytes, content: Reader) -> _Table:
    has_initial = data[content.at] == 0x40
    if has_initial:
        content.at += 2
    at = content.at
    content.value_type()
    table = _Table(data[at : content.at], content.limits())
    if has_initial:
        skip_expression(content)
    return table


def _bodies(data: bytes, content: Reader, number: int) -> Iterator[_Body]:
    for _ in range(number):
        size_at, size = content.at, content.number()
        at, content.at = content.at, content.at + size
        if _GROWTHS.search(data, at, content.at):
            sites = tuple(_sites(Reader(data, at, content.at)))
            if sites:
                yield _Body(size_at, at, content.at, sites)


def _sites(reader: Reader) -> Iterator[_Site]:
    skip_locals(reader)
    opcode = END
    while reader.at < reader.end:
        at = reader.at
        opcode = skip_instruction(reader)
        if opcode == MEMORY_GROW:
            yield _Site(at, reader.at, None)
        elif opcode == TABLE_GROW:
            again = Reader(reader.data, at + 1)
            again.number()
            yield _Site(at, reader.at, again.number())
    if opcode != END or reader.at != reader.end:
        raise ValueError(reader.at)


def _rewritten(module: _Module, name: str, start: str) -> bytes:
    """The module, once it is read."""
    sizes = list(dict.fromkeys(site.table for body in module.bodies for site in body.sites))
    note = module.imported[_GLOBAL] + module.counts.get(_GLOBALS, 0)
    growers = [_grower(module, table, note) for table in sizes]
    first = module.imported[_FUNCTION] + module.counts[_FUNCTIONS]
    calls = {table: call(number) for number, table in enumerate(sizes, first)}
    code, addresses = _code(module, calls, [grower.body for grower in growers])
    added = {
        _TYPES: [grower.type for grower in growers],
        _FUNCTIONS: [leb(number) for number, _ in enumerate(growers, module.counts[_TYPES])],
        _GLOBALS: [NOTE],
    }

    starts = [] if module.start is None else [_export(start, _FUNCTION, module.start)]

    def front(exported: str) -> bytes:
        exports = [*starts, _export(exported, _GLOBAL, note)]
        return _before_code(module, {**added, _EXPORTS: exports}) + bytes([_CODE]) + leb(len(code))

    size = len(front(f"{name} {addresses.text()}"))  # which the addresses do not change
    rest = next(end for kind, _, _, end in module.sections if kind == _CODE)
    return front(f"{name} {addresses.behind(size).text()}") + code + module.data[rest:]


def _export(name: str, kind: int, number: int) -> bytes:
    return sized(name.encode()) + bytes([kind]) + leb(number)


def _before_code(module: _Module, added: Mapping[int, Sequence[bytes]]) -> bytes:
    """All in front of the code but the start, with entries put behind those of its sections."""
    out = bytearray(module.data[:HEADER])
    left = sorted(added, key=_ORDER.__getitem__)
    for kind, begin, at, end in module.sections:
        while left and kind in _ORDER and _ORDER[left[0]] < _ORDER[kind]:  # it had none
            out += _section(left[0], b"", 0, added[left.pop(0)])
        if kind == _CODE:
            break
        if left and kind == left[0]:
            content = Reader(module.data, at, end)
            number = content.number()
            out += _section(kind, module.data[content.at : end], number, added[left.pop(0)])
        elif kind != _START:
            out += module.data[begin:end]
    return bytes(out)


def _section(kind: int, entries: bytes, number: int, added: Sequence[bytes]) -> bytes:
    return bytes([kind]) + sized(leb(number + len(added)) + entries + b"".join(added))


def _code(module: _Module, calls: Mapping[int | None, bytes], added: Sequence[bytes]) -> tuple[bytes, Addresses]:
    """The content of the section, and the addresses in it."""
    content = next(_contents(module, _CODE))
    data, out = module.data, bytearray(leb(content.number() + len(added)))
    moved: list[tuple[int, int]] = []

    def keep(begin: int, end: int) -> int:
        if not moved or moved[-1][1] - moved[-1][0] != begin - len(out):
            moved.append((len(out), begin))
        out.extend(data[begin:end])
        return end

    at = content.at
    for body in module.bodies:
        keep(at, body.size_at)
        longer = sum(len(calls[site.table]) - (site.end - site.at) for site in body.sites)
        out += leb(body.end - body.at + longer)
        at = body.at
        for site in body.sites:
            keep(at, site.at)
            out += calls[site.table]
            at = site.end
    keep(at, content.end)
    addresses = Addresses(tuple(moved), len(out))
    for each in added:
        out += sized(each)
    return bytes(out), addresses


def _grower(module: _Module, table: int | None, note: int) -> Grower:
    if table is not None:
        return grows_table(table, module.tables[table].element, module.tables[table].limits, note)
    if module.memory is None:
        raise ValueError(table)
    return grows_memory(module.memory, note)
