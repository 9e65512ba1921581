"""Hook files: what they may say, and which of them are for a container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cri_shim.adapters.hooks import hook_files
from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec.hooks import Subject, merged, of_container, parse_hook

HOOK = {"path": "/usr/bin/hook", "args": ["hook", "now"], "env": ["A=1"], "timeout": 5}
SUBJECT = Subject("/bin/sh", {"team": "blue", "role": "web"}, bind_mounts=True)


def text(when: dict[str, Any], stages: tuple[str, ...] = ("createRuntime",), **changes: object) -> bytes:
    file = {"version": "1.0.0", "hook": HOOK, "when": when, "stages": stages, **changes}
    return json.dumps({key: value for key, value in file.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"always": True}, True),
        ({"always": False}, False),
        ({"always": False, "commands": ["sh"]}, False),
        ({"commands": ["^/bin/sh$"]}, True),
        ({"commands": ["^sh$", "bash"]}, False),
        ({"commands": ["python", "/sh"]}, True),
        ({"annotations": {"^team$": "^(blue|red)$"}}, True),
        ({"annotations": {"^team$": "green"}}, False),
        ({"annotations": {"^te": "blue", "role": "w"}}, True),
        ({"annotations": {"team": "blue", "absent": ".*"}}, False),
        # Key and value of the same annotation.
        ({"annotations": {"role": "blue"}}, False),
        ({"hasBindMounts": True}, True),
        ({"hasBindMounts": False}, False),
        # All of them have to hold.
        ({"always": True, "commands": ["none"]}, False),
        ({"hasBindMounts": True, "commands": ["sh"], "annotations": {"team": "blue"}}, True),
    ],
)
def test_conditions(when: dict[str, Any], expected: bool) -> None:
    assert bool(of_container([parse_hook(text(when))], SUBJECT)) is expected


def test_hooks_are_in_the_stages_of_their_file_and_in_the_order_of_the_files() -> None:
    first = parse_hook(text({"always": True}, ("poststop", "createRuntime")))
    second = parse_hook(text({"always": True}, ("createRuntime",), hook={"path": "/second"}))
    hooks = of_container([first, second], SUBJECT)
    assert hooks == {"createRuntime": [HOOK, {"path": "/second"}], "poststop": [HOOK]}
    assert merged({"poststop": [{"path": "/a"}]}, hooks)["poststop"] == [{"path": "/a"}, HOOK]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (text({"always": True}, version="0.1.0"), "version '0.1.0' is not 1.0.0"),
        (text({"always": True}, version=None), "missing required field `version`"),
        (text({"always": True}, ("startup",)), "Invalid enum value 'startup'"),
        (text({"always": True}, ()), "stages is empty"),
        (text({}), "when has no condition"),
        (text({"sometimes": True}), "unknown field `sometimes`"),
        (text({"commands": ["("]}), r"'\(' is not a regular expression"),
        (text({"annotations": {"x": "*"}}), r"'\*' is not a regular expression"),
        (text({"always": True}, hook={"path": "hook"}), "is not an absolute path"),
        (b"", "Input data was truncated"),
    ],
)
def test_what_is_not_understood_is_an_error(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_hook(data)


def test_files_of_later_directories_win_and_names_give_the_order(tmp_path: Path) -> None:
    usr, etc = tmp_path / "usr", tmp_path / "etc"
    usr.mkdir()
    etc.mkdir()
    for directory, name in ((usr, "02-b.json"), (usr, "01-UPPER.json"), (usr, "01-lower.json"), (etc, "02-b.json")):
        (directory / name).write_bytes(text({"always": True}, hook={"path": f"/{directory.name}/{name}"}))
    (etc / "notes.txt").write_text("no hook")
    found = [file.hook.path for file in hook_files([usr, etc, tmp_path / "not-there"])]
    assert found == ["/usr/01-lower.json", "/usr/01-UPPER.json", "/etc/02-b.json"]


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"hooks_dirs: .*/x.json cannot be used: .*move it out"):
        hook_files([tmp_path])
    (tmp_path / "x.json").unlink()
    (tmp_path / "big.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(FailedPrecondition, match="larger than"):
        hook_files([tmp_path])
