"""Reading YAML with positions, merging drop-ins, and turning every fault into file, line and hint.

Later files win key by key: mappings merge, everything else replaces. PyYAML's node tree is used because it keeps the
position of each key, which a plain decoder drops.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml

from cri_shim.config.sections import Config
from cri_shim.model.errors import InvalidArgument

S = TypeVar("S", bound=msgspec.Struct)
Origins = dict[tuple[str, ...], str]
"""Path of a key → `file:line`."""

_BOOLEAN = "tag:yaml.org,2002:bool"
DEFAULT_FILE = Path("/etc/cri-shim/config.yaml")


def load(file: Path | None) -> tuple[Config, Origins]:
    """Read `file` and the `conf.d/*.yaml` beside it, in lexical order.

    None = the default file if it exists, else built-in defaults. Raises InvalidArgument for what is wrong.
    """
    if file is None and not DEFAULT_FILE.exists():
        return Config(), {}
    main = file or DEFAULT_FILE
    sources = [main, *sorted((main.parent / "conf.d").glob("*.yaml"))]
    texts = []
    for source in sources:
        try:
            texts.append((str(source), source.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
            msg = f"cannot read configuration {source}: {cause}"
            raise InvalidArgument(msg) from error
    return load_text(texts)


def load_text(sources: Iterable[tuple[str, str]]) -> tuple[Config, Origins]:
    """Merge (name, YAML text) pairs and check the result."""
    merged: dict[str, Any] = {}
    origins: Origins = {}
    for name, text in sources:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise InvalidArgument(_yaml_fault(name, error)) from error
        if node is None:
            continue
        if not isinstance(node, yaml.MappingNode):
            msg = f"{name}:1: the configuration must be a mapping of keys"
            raise InvalidArgument(msg)
        _merge(merged, _plain(node, name, (), origins))
    return decode(merged, Config, origins), origins


def decode(data: Mapping[str, Any], into: type[S], origins: Origins, prefix: tuple[str, ...] = ()) -> S:
    """Check `data` against a section type; faults name the origin, and the nearest known key for an unknown one."""
    _refuse_unknown(data, into, origins, prefix)
    try:
        return msgspec.convert(data, into)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `")
        path = (*prefix, *(part for part in where.removeprefix("$").rstrip("`").split(".") if part))
        named = ".".join(path)
        msg = f"{_origin(origins, path)}: {named}: {text[:1].lower() + text[1:]}"
        raise InvalidArgument(msg) from error


def _plain(node: yaml.Node, name: str, path: tuple[str, ...], origins: Origins) -> Any:
    """Turn a node tree into plain values and note where each key stands."""
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                msg = f"{name}:{key_node.start_mark.line + 1}: keys must be plain strings"
                raise InvalidArgument(msg)
            key = str(key_node.value)
            where = f"{name}:{key_node.start_mark.line + 1}"
            if key in result:
                msg = f"{where}: key {'.'.join((*path, key))!r} stands twice; remove one"
                raise InvalidArgument(msg)
            origins[*path, key] = where
            result[key] = _plain(value_node, name, (*path, key), origins)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, name, path, origins) for item in node.value]
    if node.tag == _BOOLEAN and node.value.lower() not in {"true", "false"}:
        # YAML 1.1 takes off, no, on and yes for booleans; `wasm: off` means the word, as in YAML 1.2.
        return node.value
    return yaml.SafeLoader("").construct_object(node)


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _refuse_unknown(
    data: Mapping[str, Any], into: type[msgspec.Struct], origins: Origins, prefix: tuple[str, ...]
) -> None:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(into)}
    for key, value in data.items():
        path = (*prefix, key)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            msg = f"{_origin(origins, path)}: unknown key {'.'.join(path)!r}"
            raise InvalidArgument(msg, hint=hint)
        for section in (known[key], *get_args(known[key])):
            if isinstance(value, dict) and isinstance(section, type) and issubclass(section, msgspec.Struct):
                _refuse_unknown(value, section, origins, path)


def _origin(origins: Origins, path: tuple[str, ...]) -> str:
    while path:
        if path in origins:
            return origins[path]
        path = path[:-1]
    return "configuration"


def _yaml_fault(name: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{name}:{error.problem_mark.line + 1}: {error.problem or 'not valid YAML'}"
    return f"{name}: not valid YAML: {error}"
