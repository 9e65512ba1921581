from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.model.errors import FailedPrecondition, Internal
from cri_shim.wire import oci_state
from cri_shim.wire.conmon import Created, Failed, parse_exit, parse_sync


def test_sync_line_is_a_pid_or_a_failure() -> None:
    assert parse_sync(b'{"pid": 21655}\n') == Created(21655)
    assert parse_sync(b'{"pid": -1, "message": "no such\\n"}\n') == Failed("no such")
    assert parse_sync(b'{"pid": 0}') == Failed("")


@pytest.mark.parametrize("line", [b"", b"nonsense", b"[]", b'{"pid": "x"}', b'{"message": "m"}', b"\xff\xfe"])
def test_what_is_no_sync_line_is_an_error_that_shows_it(line: bytes) -> None:
    with pytest.raises(Internal, match="conmon wrote"):
        parse_sync(line)


@given(st.binary(max_size=200))
def test_sync_line_parses_or_is_an_internal_error(line: bytes) -> None:
    try:
        parse_sync(line)
    except Internal:
        return


@pytest.mark.parametrize(
    ("content", "status"), [(b"0", 0), (b"137", 137), (b"255\n", 255), (b"-1", 255), (b"9999", 255)]
)
def test_exit_status(content: bytes, status: int) -> None:
    assert parse_exit(content) == status


def test_broken_exit_file_is_an_error() -> None:
    with pytest.raises(Internal, match="exit file"):
        parse_exit(b"")


def test_version_of_runc_and_crun() -> None:
    runc = oci_state.parse_version("runc version 1.1.5+ds1\ncommit: x\nspec: 1.0.2-dev\ngo: go1.19\n")
    assert (runc.name, runc.version, runc.spec, runc.tags) == ("runc", "1.1.5+ds1", "1.0.2-dev", frozenset())
    crun = oci_state.parse_version("crun version 1.8.1\nspec: 1.0.0\n+SYSTEMD +WASM:wasmedge +YAJL\n")
    assert (crun.spec, crun.tags) == ("1.0.0", frozenset({"SYSTEMD", "WASM:wasmedge", "YAJL"}))
    with pytest.raises(Internal, match="--version"):
        oci_state.parse_version("")


def test_features() -> None:
    document = b"""{"ociVersionMax": "1.2.0", "mountOptions": ["ro", "rro"], "more": [1],
        "linux": {"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": true}}}}"""
    assert oci_state.parse_features(document) == oci_state.RuntimeFeatures(
        recursive_read_only=True, user_namespaces=True
    )
    assert oci_state.parse_features(b"{}") == oci_state.RuntimeFeatures(
        recursive_read_only=False, user_namespaces=False
    )
    with pytest.raises(Internal, match="features"):
        oci_state.parse_features(b"[")


def test_last_error_skips_what_is_no_error_and_no_line() -> None:
    log = b'{"level":"error","msg":"first"}\n{"level":"error","msg":"last"}\n{"level":"info","msg":"more"}\n{"broken\n'
    assert oci_state.last_error(log) == "last"
    assert oci_state.last_error(b"") == ""


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ('exec: "nope": executable file not found in $PATH', "has no /bin/app"),
        ("executable file `nope` not found in $PATH: No such file or directory", "has no /bin/app"),
        ('exec: "/bin/app": stat /bin/app: no such file or directory', "has no /bin/app"),
        ("exec /bin/app: exec format error", "RuntimeClass"),
        ("exec /bin/app: no such file or directory", "lacks what /bin/app is run by"),
        ("exec container process (missing dynamic library?) `//bin/app`: No such file or directory", "dynamic loader"),
        ("open executable: Permission denied", "may execute"),
        ('exec: "/bin/app": stat /bin/app: too many levels of symbolic links', "a symbolic link in a circle"),
        ("open executable: Too many levels of symbolic links", "a symbolic link in a circle"),
    ],
)
def test_errors_of_the_image_have_a_hint(said: str, hint: str) -> None:
    error = oci_state.runtime_error("cannot create", said, ("/bin/app",))
    assert isinstance(error, FailedPrecondition)
    assert said in error.cause
    assert hint in error.hint


def test_other_errors_are_ours_and_say_what_was_said() -> None:
    error = oci_state.runtime_error("cannot create", "mount proc: permission denied")
    assert isinstance(error, Internal)
    assert str(error) == "cannot create: mount proc: permission denied"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("some output\nexec /bin/app: exec format error", "format error"),
        (
            '{"msg":"exec container process `/bin/app`: Exec format error","level":"error","time":"2026"}',
            "format error",
        ),
        ("exec /bin/app: no such file or directory", "no such file"),
        ('{"msg":"exec container process (missing dynamic library?) `//bin/app`: No such file"}', "No such file"),
    ],
)
def test_refused_execution_is_found_in_the_last_words(words: str, why: str) -> None:
    assert why in oci_state.execute_error(words, "app")
    assert oci_state.execute_error(words, "other") == ""
    assert oci_state.execute_error(f"{words}\nlater line", "app") == ""
