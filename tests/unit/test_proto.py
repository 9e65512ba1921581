"""Holds the compiled CRI interface against the facts it is made from, and the generator to its word."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

from cri_shim.pb import api_pb2 as pb
from cri_shim.pb import api_pb2_grpc as stubs

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATOR = REPOSITORY / "scripts/gen-proto"
FACTS_FILE = Path("proto/cri-api-v0.37.2.json")
COMMENTS_FILE = Path("proto/comments.toml")

FACTS: dict[str, Any] = json.loads((REPOSITORY / FACTS_FILE).read_text())
COMPILED = FileDescriptorProto()
pb.DESCRIPTOR.CopyToProto(COMPILED)


def local_name(type_name: str) -> str:
    """Name of a type of this package as the facts write it. Foreign types stay recognisable."""
    return type_name.removeprefix(f".{COMPILED.package}.")


def field_type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    if entry := maps.get(local_name(field.type_name)):
        key, value = (field_type(part, {}) for part in entry.field)
        return f"map<{key}, {value}>"
    if field.type_name:
        return local_name(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def field_facts(
    field: FieldDescriptorProto, message: DescriptorProto, maps: dict[str, DescriptorProto]
) -> dict[str, object]:
    """What was compiled of a field, in the form of the facts file, with all that the facts do not have."""
    kind = field_type(field, maps)
    facts: dict[str, object] = {"name": field.name, "number": field.number, "type": kind}
    if field.label == FieldDescriptorProto.LABEL_REPEATED and not kind.startswith("map<"):
        facts["repeated"] = True
    if field.label == FieldDescriptorProto.LABEL_REQUIRED:
        facts["required"] = True
    if field.options.deprecated:
        facts["deprecated"] = True
    if field.HasField("oneof_index"):
        facts["oneof"] = message.oneof_decl[field.oneof_index].name
    if field.proto3_optional:
        facts["optional"] = True
    return facts


def compiled_messages(
    messages: Iterable[DescriptorProto], scope: str = ""
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Every message with its fields; nested ones by dotted name, map entries folded into their field."""
    for message in messages:
        name = f"{scope}{message.name}"
        maps = {f"{name}.{inner.name}": inner for inner in message.nested_type if inner.options.map_entry}
        yield name, [field_facts(field, message, maps) for field in message.field]
        inner_messages = (inner for inner in message.nested_type if not inner.options.map_entry)
        yield from compiled_messages(inner_messages, f"{name}.")


def compiled_enums() -> Iterator[tuple[str, EnumDescriptorProto]]:
    for enum in COMPILED.enum_type:
        yield enum.name, enum
    for message in COMPILED.message_type:
        for enum in message.enum_type:
            yield f"{message.name}.{enum.name}", enum


def compiled_services() -> dict[str, list[dict[str, object]]]:
    services: dict[str, list[dict[str, object]]] = {}
    for service in COMPILED.service:
        methods = services.setdefault(service.name, [])
        for method in service.method:
            facts: dict[str, object] = {
                "name": method.name,
                "input": local_name(method.input_type),
                "output": local_name(method.output_type),
            }
            if method.client_streaming:
                facts["client_streaming"] = True
            if method.server_streaming:
                facts["server_streaming"] = True
            methods.append(facts)
    return services


def test_file_is_the_package_of_the_facts_and_stands_alone() -> None:
    assert (COMPILED.package, COMPILED.syntax) == (FACTS["package"], FACTS["syntax"])
    assert not COMPILED.dependency
    assert not COMPILED.extension


def test_services_equal_the_facts() -> None:
    assert compiled_services() == FACTS["services"]


def test_there_are_no_other_messages_than_in_the_facts() -> None:
    assert {name for name, _ in compiled_messages(COMPILED.message_type)} == set(FACTS["messages"])


@pytest.mark.parametrize("name", FACTS["messages"])
def test_message_equals_the_facts(name: str) -> None:
    compiled = dict(compiled_messages(COMPILED.message_type))
    assert compiled[name] == FACTS["messages"][name]


def test_messages_reserve_and_extend_nothing() -> None:
    for message in COMPILED.message_type:
        extra = (message.reserved_range, message.reserved_name, message.extension, message.extension_range)
        assert not any(extra), message.name


def test_enums_equal_the_facts() -> None:
    compiled = {name: {value.name: value.number for value in enum.value} for name, enum in compiled_enums()}
    assert compiled == FACTS["enums"]


def test_enums_have_no_aliases_and_deprecate_nothing() -> None:
    for name, enum in compiled_enums():
        assert not enum.options.allow_alias, name
        assert not any(value.options.deprecated for value in enum.value), name


def test_servicers_answer_every_method() -> None:
    servicers = {"RuntimeService": stubs.RuntimeServiceServicer, "ImageService": stubs.ImageServiceServicer}
    assert servicers.keys() == FACTS["services"].keys()
    for name, servicer in servicers.items():
        public = {member for member in vars(servicer) if not member.startswith("_")}
        assert public == {method["name"] for method in FACTS["services"][name]}


def gen_proto(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GENERATOR), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the generator reads and writes."""
    shutil.copytree(REPOSITORY / "proto", tmp_path / "proto")
    shutil.copytree(REPOSITORY / "cri_shim/pb", tmp_path / "cri_shim/pb")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is not there exactly once"
    path.write_text(text.replace(old, new))


def test_committed_output_is_what_the_generator_writes() -> None:
    done = gen_proto("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_check_names_stale_files_and_leaves_them_alone(tree: Path) -> None:
    proto, module = tree / "proto/runtime/v1/api.proto", tree / "cri_shim/pb/api_pb2.py"
    replace(proto, "int32 host_port = 3;", "int32 host_port = 5;")
    module.unlink()
    done = gen_proto("--check", "--root", str(tree))
    assert done.returncode == 1
    assert "proto/runtime/v1/api.proto is stale" in done.stderr
    assert "-  int32 host_port = 5;" in done.stderr
    assert "+  int32 host_port = 3;" in done.stderr
    assert "cri_shim/pb/api_pb2.py is stale" in done.stderr
    assert "api_pb2_grpc.py is stale" not in done.stderr
    assert "int32 host_port = 5;" in proto.read_text()
    assert not module.exists()


@pytest.mark.parametrize(
    ("present", "complaint"),
    [
        ("Attach = ", "no comment for method RuntimeService.Attach"),
        ("[services.ImageService]\nabout = ", "no comment for service ImageService"),
        ("[messages.PodIP]\nabout = ", "no comment for message PodIP"),
        ("[enums.MetricType]\nabout = ", "no comment for enum MetricType"),
        ("host_ip = ", "empty comment for field PortMapping.host_ip"),
        ("COUNTER = ", "empty comment for value MetricType.COUNTER"),
    ],
)
def test_generator_refuses_a_comment_without_words(tree: Path, present: str, complaint: str) -> None:
    replace(tree / COMMENTS_FILE, f'\n{present}"', f'\n{present}" " #')
    done = gen_proto("--root", str(tree))
    assert (done.returncode, done.stderr) == (1, f"gen-proto: {COMMENTS_FILE}: {complaint}\n")


@pytest.mark.parametrize(
    ("present", "instead", "complaint"),
    [
        ("\nAttach = ", "\n#", "no comment for method RuntimeService.Attach"),
        ("\nhost_ip = ", "\nhost_iq = ", "comment for unknown field PortMapping.host_iq"),
        ("\n[messages.PodIP]\n", "\n[messages.PodIPs]\n", "no comment for message PodIP"),
    ],
)
def test_generator_refuses_a_missing_and_an_unknown_name(
    tree: Path, present: str, instead: str, complaint: str
) -> None:
    replace(tree / COMMENTS_FILE, present, instead)
    done = gen_proto("--root", str(tree))
    assert (done.returncode, done.stderr) == (1, f"gen-proto: {COMMENTS_FILE}: {complaint}\n")


def test_generator_refuses_a_fact_that_it_cannot_express(tree: Path) -> None:
    replace(tree / FACTS_FILE, '"name": "host_ip",', '"name": "host_ip", "oneof": "address",')
    done = gen_proto("--root", str(tree))
    assert done.returncode == 1
    assert "`oneof`" in done.stderr
    assert "Traceback" not in done.stderr
