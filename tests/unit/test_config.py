"""Configuration: what is valid, how drop-ins merge, and that every fault names file, line and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri_shim import config
from cri_shim.model.errors import InvalidArgument


def test_empty_is_all_defaults() -> None:
    loaded, origins = config.load_text([("c.yaml", "")])
    assert loaded == config.Config()
    assert not origins


def test_drop_ins_merge_key_by_key_in_lexical_order(tmp_path: Path) -> None:
    main = tmp_path / "config.yaml"
    main.write_text("listen: /a.sock\nlog: {level: debug, format: json}\nimages:\n  pinned: [a, b]\n")
    drop = tmp_path / "conf.d"
    drop.mkdir()
    (drop / "20-late.yaml").write_text("log: {level: error}\n")
    (drop / "10-early.yaml").write_text("log: {level: info}\nimages: {pinned: [c]}\n")
    (drop / "ignored.txt").write_text("nonsense: 1\n")
    loaded, origins = config.load(main)
    assert loaded.listen == "/a.sock"
    assert (loaded.log.level, loaded.log.format) == ("error", "json")
    assert loaded.images.pinned == ("c",)
    assert origins["log", "level"] == f"{drop}/20-late.yaml:1"
    text = config.dump(loaded, origins)
    assert f"  level: error  # {drop}/20-late.yaml:1" in text
    assert "cgroup_driver: auto  # default" in text
    assert config.load_text([("again.yaml", text)])[0] == loaded


def test_off_is_a_word_and_false_is_a_boolean() -> None:
    loaded, _ = config.load_text([("c.yaml", "handlers: {runc: {kind: oci, wasm: off}}\nimages: {keep_blobs: true}")])
    assert loaded.handlers == {"runc": {"kind": "oci", "wasm": "off"}}
    assert loaded.images.keep_blobs is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("listn: /x", r"c.yaml:1: unknown key 'listn'; did you mean 'listen'\?"),
        ("log:\n  lvel: info", r"c.yaml:2: unknown key 'log.lvel'; did you mean 'level'\?"),
        ("\nlog:\n  level: loud", r"c.yaml:3: log.level: invalid enum value 'loud'"),
        ("listen: 7", r"c.yaml:1: listen: expected `str`, got `int`"),
        ("images: {max_parallel_downloads: 0}", r"c.yaml:1: images.max_parallel_downloads: expected `int` >= 1"),
        ("network: {conf_dirs: [1]}", r"c.yaml:1: network.conf_dirs"),
        ("streaming: {idle_timeout: 4 hours}", r"c.yaml:1: streaming.idle_timeout: expected `str` matching"),
        ("streaming: {idle_timeout: ''}", r"c.yaml:1: streaming.idle_timeout: "),
        (
            "streaming:\n  tls:\n    crt_file: a",
            r"c.yaml:3: unknown key 'streaming.tls.crt_file'; did you mean 'cert_file'",
        ),
        ("streaming: {tls: {cert_file: a}}", r"c.yaml:1: streaming.tls: object missing required field `key_file`"),
        ("a: [", r"c.yaml:1"),
        ("- a\n- b", r"c.yaml:1: the configuration must be a mapping"),
        ("listen: /a\nlisten: /b", r"c.yaml:2: key 'listen' stands twice"),
        ("? [a]\n: b", r"keys must be plain strings"),
        ("zzzzzz: 1", r"known keys: .*listen"),
    ],
)
def test_faults_name_file_line_and_hint(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        config.load_text([("c.yaml", text)])


@pytest.mark.parametrize(
    ("text", "seconds"), [("4h", 14400), ("1h30m", 5400), ("90s", 90), ("2m5s", 125), ("0", 0), ("0s", 0)]
)
def test_durations(text: str, seconds: float) -> None:
    loaded, _ = config.load_text([("c.yaml", f"streaming: {{idle_timeout: '{text}'}}")])
    assert loaded.streaming.idle_seconds == seconds


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"listen: \xff")
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        config.load(tmp_path / "latin.yaml")
