"""Generates the CRI interface: `api.proto` from its facts, and the Python modules from it and from our `admin.proto`.

The facts (names, numbers, types) are in `proto/cri-api-*.json`, the words in `proto/comments.toml`.
It is not a general generator: it knows the parts of proto3 that CRI uses and refuses all others.
Invariant: the same facts, words and tool versions give the same bytes, so `--check` can compare.
"""

import argparse
import difflib
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

REPOSITORY = Path(__file__).resolve().parent.parent
FACTS = Path("proto/cri-api-v0.37.2.json")
COMMENTS = Path("proto/comments.toml")
PROTO = Path("proto/runtime/v1/api.proto")
ADMIN = Path("proto/admin/v1/admin.proto")
PACKAGE = Path("cri_shim/pb")

COLUMNS = 100
DIFF_LINES = 12

Input = TypeVar("Input")


class GenerateError(Exception):
    """The inputs do not fit together, or a tool of the tool chain failed."""


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One RPC. No CRI method takes a stream, so there is no word for that."""

    name: str
    input: str
    output: str
    server_streaming: bool = False


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One field of a message. `type` is a proto type as written in the file, `map<..>` included."""

    name: str
    number: int
    type: str
    repeated: bool = False
    deprecated: bool = False


class Interface(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The facts file. An enum inside a message has a dotted name: `Message.Enum`."""

    package: str
    syntax: str
    source: str
    services: dict[str, list[Method]]
    enums: dict[str, dict[str, int]]
    messages: dict[str, list[Field]]


class ServiceComments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Words for a service. Each method needs its own."""

    about: str
    methods: dict[str, str]


class EnumComments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Words for an enum, and for the values whose name does not tell."""

    about: str
    values: dict[str, str] = {}


class MessageComments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Words for a message, and for the fields whose name does not tell."""

    about: str
    fields: dict[str, str] = {}


class Comments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The comments file."""

    services: dict[str, ServiceComments]
    enums: dict[str, EnumComments]
    messages: dict[str, MessageComments]


def main(argv: Sequence[str]) -> int:
    """Writes the generated files, or with `--check` only compares them. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="gen-proto", description="Generate the CRI interface.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the tree to read and write (this repository)")
    args = parser.parse_args(argv)
    try:
        files = generate(args.root)
    except GenerateError as error:
        print(f"gen-proto: {error}", file=sys.stderr)
        return 1
    if args.check:
        return check(args.root, files)
    for path, text in files.items():
        target = args.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return 0


def check(root: Path, files: Mapping[Path, str]) -> int:
    """Prints how the tree under `root` differs from `files`. Returns 1 if it does, else 0."""
    stale = 0
    for path, text in files.items():
        present = root / path
        committed = present.read_text() if present.exists() else ""
        if committed == text:
            continue
        stale += 1
        before, after = committed.splitlines(), text.splitlines()
        diff = list(difflib.unified_diff(before, after, "committed", "generated", n=0, lineterm=""))[2:]
        print(f"gen-proto: {path} is stale", file=sys.stderr)
        for line in diff[:DIFF_LINES]:
            print(f"  {line[:COLUMNS]}", file=sys.stderr)
        if len(diff) > DIFF_LINES:
            print(f"  ... {len(diff) - DIFF_LINES} more lines", file=sys.stderr)
    if stale:
        print("gen-proto: run scripts/gen-proto and commit what it writes", file=sys.stderr)
    return 1 if stale else 0


def generate(root: Path) -> dict[Path, str]:
    """Reads the inputs under `root`. Returns the text of each generated file by its path in the tree."""
    facts = read(root / FACTS, Interface)
    comments = read(root / COMMENTS, Comments)
    require_comments(facts, comments)
    proto = render(facts, comments)
    return {PROTO: proto, **compile_python(PROTO, proto), **compile_python(ADMIN, read_text(root / ADMIN))}


def read_text(path: Path) -> str:
    """The text of an input."""
    try:
        return path.read_text()
    except OSError as error:
        raise GenerateError(f"{path}: {error}") from error


def read(path: Path, shape: type[Input]) -> Input:
    """Parses a JSON or TOML file (by its suffix) into `shape`; an unknown key is an error."""
    decode = msgspec.toml.decode if path.suffix == ".toml" else msgspec.json.decode
    try:
        return decode(path.read_bytes(), type=shape)
    except (OSError, ValueError) as error:
        raise GenerateError(f"{path}: {error}") from error


def require_comments(facts: Interface, comments: Comments) -> None:
    """Refuses a service, method, enum or message without words, and words for what does not exist."""
    required = {
        *(f"service {name}" for name in facts.services),
        *(f"method {name}.{m.name}" for name, methods in facts.services.items() for m in methods),
        *(f"enum {name}" for name in facts.enums),
        *(f"message {name}" for name in facts.messages),
    }
    optional = {
        *(f"value {name}.{value}" for name, values in facts.enums.items() for value in values),
        *(f"field {name}.{f.name}" for name, fields in facts.messages.items() for f in fields),
    }
    written = dict(words_of(comments))
    present = {name for name, words in written.items() if words.strip()}
    for problem, names in (
        ("no comment for", required - present),
        ("empty comment for", optional & (written.keys() - present)),
        ("comment for unknown", written.keys() - required - optional),
    ):
        if names:
            raise GenerateError(f"{COMMENTS}: {problem} {', '.join(sorted(names))}")


def words_of(comments: Comments) -> Iterator[tuple[str, str]]:
    """Yields every comment with its kind and dotted name: `field Mount.readonly`."""
    for name, service in comments.services.items():
        yield f"service {name}", service.about
        yield from ((f"method {name}.{method}", words) for method, words in service.methods.items())
    for name, enum in comments.enums.items():
        yield f"enum {name}", enum.about
        yield from ((f"value {name}.{value}", words) for value, words in enum.values.items())
    for name, message in comments.messages.items():
        yield f"message {name}", message.about
        yield from ((f"field {name}.{field}", words) for field, words in message.fields.items())


def render(facts: Interface, comments: Comments) -> str:
    """Returns `api.proto`: the services, then the messages and the enums in the order of the facts."""
    blocks = [
        [
            f"// Generated by scripts/gen-proto from {FACTS.name} and {COMMENTS.name}. Do not edit.",
            f"// The container runtime interface, as in {facts.source}.",
        ],
        [f'syntax = "{facts.syntax}";', "", f"package {facts.package};"],
    ]
    for name, methods in facts.services.items():
        blocks.append(render_service(name, methods, comments.services[name]))
    for name, fields in facts.messages.items():
        blocks.append(render_message(name, fields, facts, comments))
    for name, values in facts.enums.items():
        if "." not in name:
            blocks.append(render_enum(name, values, comments.enums[name]))
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def render_service(name: str, methods: Iterable[Method], comments: ServiceComments) -> list[str]:
    """Returns the lines of one service."""
    lines = [*comment(comments.about), f"service {name} {{"]
    for index, method in enumerate(methods):
        stream = "stream " if method.server_streaming else ""
        lines += [""] if index else []
        lines += comment(comments.methods[method.name], indent="  ")
        lines.append(f"  rpc {method.name}({method.input}) returns ({stream}{method.output});")
    return [*lines, "}"]


def render_message(name: str, fields: Sequence[Field], facts: Interface, comments: Comments) -> list[str]:
    """Returns the lines of one message with the enums that are declared inside it."""
    words = comments.messages[name]
    inner = {key: values for key, values in facts.enums.items() if key.startswith(f"{name}.")}
    if not fields and not inner:
        return [*comment(words.about), f"message {name} {{}}"]
    lines = [*comment(words.about), f"message {name} {{"]
    for key, values in inner.items():
        lines += render_enum(key.removeprefix(f"{name}."), values, comments.enums[key], indent="  ")
        lines.append("")
    for field in fields:
        lines += comment(words.fields.get(field.name, ""), indent="  ")
        label = "repeated " if field.repeated else ""
        # A nested enum is in the scope of its message; the short name is enough there.
        kind = field.type.removeprefix(f"{name}.")
        options = " [deprecated = true]" if field.deprecated else ""
        lines.append(f"  {label}{kind} {field.name} = {field.number}{options};")
    return [*lines, "}"]


def render_enum(name: str, values: Mapping[str, int], comments: EnumComments, indent: str = "") -> list[str]:
    """Returns the lines of one enum."""
    lines = [*comment(comments.about, indent), f"{indent}enum {name} {{"]
    for value, number in values.items():
        lines += comment(comments.values.get(value, ""), f"{indent}  ")
        lines.append(f"{indent}  {value} = {number};")
    return [*lines, f"{indent}}}"]


def comment(words: str, indent: str = "") -> list[str]:
    """Returns `words` as comment lines of at most `COLUMNS` columns; none for no words."""
    prefix = f"{indent}// "
    return textwrap.wrap(words, COLUMNS, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def compile_python(path: Path, proto: str) -> dict[Path, str]:
    """Runs protoc with the gRPC and mypy plugins on the text of `path`. Returns the modules and stubs of `PACKAGE`."""
    with tempfile.TemporaryDirectory(prefix="gen-proto-") as directory:
        source = Path(directory, "source")
        output = Path(directory, "output")
        output.mkdir()
        name = path.relative_to("proto")
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text(proto)
        run_protoc(source, output, name)
        generated = output / name.parent
        # protoc places and names modules by the path of the .proto file, not by the package they go to.
        module = ".".join(name.parent.parts)
        return {
            PACKAGE / made.name: finish(made.read_text(), path, module, stub=made.suffix == ".pyi")
            for made in sorted(generated.iterdir())
        }


def run_protoc(source: Path, output: Path, name: Path) -> None:
    """Compiles `source/name` into `output` with the tools of the running interpreter."""
    tools = Path(sys.executable).parent
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={source}"),
        f"--plugin=protoc-gen-mypy={tools / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={tools / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={output}" for kind in ("python", "grpc_python")),
        *(f"--{kind}_out=quiet:{output}" for kind in ("mypy", "mypy_grpc")),
        str(name),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GenerateError(f"protoc failed ({done.returncode}): {done.stderr.strip()}")


def finish(text: str, source: Path, module: str, *, stub: bool) -> str:
    """Adds our header to a generated file and makes it import its sibling from `PACKAGE`."""
    package = ".".join(PACKAGE.parts)
    text = text.replace(f"from {module} import ", f"from {package} import ")
    # The mypy plugin does not write @override, which this project asks of all code.
    directive = '# mypy: disable-error-code="explicit-override"\n' if stub else ""
    return f"# Generated by scripts/gen-proto from {source}. Do not edit.\n{directive}{text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
