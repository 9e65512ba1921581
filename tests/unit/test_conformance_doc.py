"""Holds docs/conformance.md to its word: RPCs against the daemon's own tables, fields against the interface, tests too.

Not what a line claims in words: that is for the tests that it names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor

from cri_shim.pb import api_pb2 as pb
from tests.support import markdown
from tests.support.fields import is_map
from tests.support.markdown import Row
from tests.support.wired import wired

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "conformance.md"
ROWS = markdown.rows(PAGE)

SERVICES = pb.DESCRIPTOR.services_by_name
MESSAGES = pb.DESCRIPTOR.message_types_by_name
STATES = ("supported", "reported", "not set", "refused", "ignored", "gap")
NAMED_TEST = re.compile(r"`([\w/]+\.py)::([\w:]+)`")


def rpcs(service: str) -> dict[str, str]:
    """The state of each RPC in the service's table."""
    listed = [row.cells for row in ROWS if row.headings[-1] == service]
    assert len({name for name, *_ in listed}) == len(listed), "an RPC is listed twice"
    return {name: state for name, state, _ in listed}


def field_rows() -> Iterator[tuple[Row, list[str]]]:
    """Each row about fields, and their full names. Under the heading of a message its name is left out."""
    for row in ROWS:
        prefix = next((f"{word}." for word in re.findall(r"`(\w+)`", row.headings[-1]) if word in MESSAGES), "")
        if names := row.codes(0):
            yield row, [prefix + name for name in names]


def answered_by(service: ServiceDescriptor) -> set[str]:
    """Messages of the RPCs that are there."""
    states = rpcs(service.name)
    there = [method for method in service.methods if states[method.name].startswith("supported")]
    return {message.name for method in there for message in (method.input_type, method.output_type)}


def left_out(message: Descriptor, known_as: AbstractSet[str], named: AbstractSet[str]) -> Iterator[str]:
    """Fields that are neither named nor below one that is; a message inside goes by its own name too."""
    for field in message.fields:
        names = {f"{name}.{field.name}" for name in known_as}
        if names & named:
            continue
        if field.message_type is None or is_map(field):
            yield min(names)
        else:
            yield from left_out(field.message_type, names | {field.message_type.name}, named)


def resolve(name: str) -> FieldDescriptor | None:
    """The field that a full name stands for, None if there is none."""
    first, *path = name.split(".")
    message = MESSAGES.get(first)
    field: FieldDescriptor | None = None
    for part in path:
        field = message.fields_by_name.get(part) if message is not None else None
        message = field.message_type if field is not None else None
    return field


@cache
def names_of_tests(file: Path) -> frozenset[str]:
    """The names of a file's tests, those of a class with the class in front."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = {f"{node.name}::": node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    return frozenset(
        prefix + node.name
        for prefix, body in {"": tree.body, **classes}.items()
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


async def test_rpcs_have_the_state_that_the_daemon_gives_them(tmp_path: Path) -> None:
    async with wired(tmp_path) as flows:
        for name, table in (("RuntimeService", flows.runtime), ("ImageService", flows.image)):
            states = rpcs(name)
            assert list(states) == [method.name for method in SERVICES[name].methods]
            assert {rpc for rpc, state in states.items() if state.startswith("supported")} == set(table)
            others = [state for rpc, state in states.items() if rpc not in table]
            assert all(state.startswith("UNIMPLEMENTED: ") for state in others)


@pytest.mark.parametrize("service", list(SERVICES))
def test_no_field_is_left_out(service: str) -> None:
    # What differs for one handler is said once more, and is not all.
    named = {name for row, names in field_rows() if "differs" not in row.headings[-1] for name in names}
    missing = [
        field
        for message in sorted(answered_by(SERVICES[service]))
        for field in left_out(MESSAGES[message], {message}, named)
    ]
    assert missing == []


@pytest.mark.parametrize(("row", "names"), list(field_rows()), ids=[row.cells[0][:60] for row, _ in field_rows()])
def test_rows_name_fields_and_a_state(row: Row, names: list[str]) -> None:
    assert [name for name in names if resolve(name) is None] == []
    assert row.cells[1].startswith(STATES)


def test_no_field_has_two_rows_in_a_table() -> None:
    named = [(row.headings, name) for row, names in field_rows() for name in names]
    assert sorted({entry for entry in named if named.count(entry) > 1}) == []


def test_every_test_that_is_named_exists() -> None:
    named = NAMED_TEST.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 100
    assert [f"{file}::{test}" for file, test in named if test not in names_of_tests(TESTS / file)] == []


def test_the_last_cell_names_tests_or_a_dash() -> None:
    for row in ROWS:
        if row.headings[1] != "critest 1.36":
            assert row.cells[-1] == "–" or NAMED_TEST.sub("", row.cells[-1]).strip(", ") == "", row
