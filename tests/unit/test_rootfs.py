"""Looking into an image's files, which are hostile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cri_shim.adapters.rootfs import entrypoint_kind, read_facts
from cri_shim.model.entry import EntryKind, EntryPoint
from cri_shim.model.errors import InvalidArgument

ELF = b"\x7fELF" + b"\0" * 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "rootfs"
    for directory in ("bin", "usr/bin", "etc", "srv"):
        (top / directory).mkdir(parents=True)
    return top


def put(path: Path, content: bytes, mode: int = 0o755) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def kind(root: Path, word: str, cwd: str = "/", search: str = "/usr/bin:/bin") -> EntryKind:
    return entrypoint_kind(root, EntryPoint(word, cwd, search))


def test_kinds(root: Path) -> None:
    contents = {"elf": ELF, "script": b"#!/bin/sh\n", "wasm": b"\0asm\1\0\0\0", "text": b"x", "no": b""}
    for name, content in contents.items():
        put(root / "bin" / name, content)
    assert [kind(root, name) for name in (*contents, "gone")] == [
        *(EntryKind.ELF, EntryKind.SCRIPT, EntryKind.WASM, EntryKind.OTHER, EntryKind.OTHER, EntryKind.MISSING),
    ]


def test_path_is_searched_in_order_and_skips_what_cannot_run(root: Path) -> None:
    put(root / "usr/bin/app", ELF, 0o644)
    put(root / "bin/app", b"#!/bin/sh")
    assert kind(root, "app") is EntryKind.SCRIPT
    (root / "usr/bin/app").chmod(0o755)
    assert kind(root, "app") is EntryKind.ELF


def test_words_with_a_slash_are_paths(root: Path) -> None:
    put(root / "srv/app", ELF)
    assert kind(root, "./app", cwd="/srv") is EntryKind.ELF
    assert kind(root, "/srv/app") is EntryKind.ELF
    assert kind(root, "srv/app", cwd="/") is EntryKind.ELF
    assert kind(root, "app", cwd="/srv") is EntryKind.MISSING


def test_a_wasm_file_needs_no_x_bit(root: Path) -> None:
    put(root / "srv/app.wasm", b"\0asm\1\0\0\0", 0o644)
    assert kind(root, "/srv/app.wasm") is EntryKind.WASM


def test_a_wasm_file_is_found_in_the_working_directory_too(root: Path) -> None:
    put(root / "srv/app.wasm", b"\0asm\1\0\0\0", 0o644)
    assert kind(root, "app.wasm", cwd="/srv") is EntryKind.WASM
    assert kind(root, "app.wasm#serve", cwd="/srv") is EntryKind.WASM
    assert kind(root, "app.wasm") is EntryKind.MISSING
    put(root / "bin/app.wasm", ELF)
    assert kind(root, "app.wasm", cwd="/srv") is EntryKind.ELF


def test_links_stay_inside(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "outside", ELF)
    (root / "bin/up").symlink_to("../../outside")
    (root / "bin/absolute").symlink_to(tmp_path / "outside")
    (root / "bin/loop").symlink_to("loop")
    (root / "bin/proc").symlink_to("/proc/self/exe")
    put(root / "srv/real", ELF)
    (root / "bin/inside").symlink_to("/srv/real")
    assert [kind(root, name) for name in ("up", "absolute", "loop", "proc", "inside")] == [
        *([EntryKind.MISSING] * 4),
        EntryKind.ELF,
    ]


def test_what_is_no_file_is_never_opened(root: Path) -> None:
    os.mkfifo(root / "bin/fifo", 0o777)  # opening it would wait for a writer
    (root / "bin/directory").mkdir()
    assert kind(root, "fifo") is EntryKind.MISSING
    assert kind(root, "directory") is EntryKind.MISSING
    assert kind(root, "x" * 5000) is EntryKind.MISSING


def test_user_database_is_read_from_inside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("host:x:1:1::/:\n")
    (root / "etc/passwd").symlink_to("../../passwd")
    entry = EntryPoint("x", "/", "/bin")
    assert read_facts(root, entry).users.accounts == ()
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").write_text("app:x:5:6::/home:\n")
    (root / "etc/group").write_text("web:x:7:app\n")
    users = read_facts(root, entry).users
    assert (users.accounts[0].name, users.groups[0].members) == ("app", frozenset({"app"}))


def test_user_database_that_is_a_device_is_refused(root: Path) -> None:
    os.mkfifo(root / "etc/passwd")
    with pytest.raises(InvalidArgument, match="not a regular file"):
        read_facts(root, EntryPoint("x", "/", "/bin"))
