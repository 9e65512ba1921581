from __future__ import annotations

import pytest

from cri_shim.model.container import User
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import ProcessPlan
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageConfig, ImageRecord, Platform, WasmModule
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.process import DEFAULT_PATH, process_plan
from cri_shim.spec.stop_signal import parse_signal, stop_signal
from cri_shim.spec.users import UserDatabase

DIGEST = Digest("sha256:" + "a" * 64)


def image(config: ImageConfig | None = None, *, wasm: bool = False) -> ImageRecord:
    return ImageRecord(
        id=ImageId(DIGEST),
        manifest=DIGEST,
        index=None,
        config_digest=DIGEST,
        size=1,
        platform=Platform("linux", "amd64"),
        config=config or ImageConfig(entrypoint=("/entry",), cmd=("default",)),
        pulled_at=0,
        repo_tags=("example/image:1",),
        wasm=WasmModule(DIGEST, "application/wasm", 1) if wasm else None,
    )


def plan(config: pb.ContainerConfig, of: ImageRecord | None = None) -> ProcessPlan:
    return process_plan(config, "pod-name", of or image(), UserDatabase(), {})


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ((), (), ("/entry", "default")),
        ((), ("a", "b"), ("/entry", "a", "b")),
        (("/own",), (), ("/own",)),
        (("/own", "x"), ("a",), ("/own", "x", "a")),
    ],
)
def test_command_replaces_entrypoint_and_cmd(
    command: tuple[str, ...], args: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert plan(pb.ContainerConfig(command=command, args=args)).args == expected


@pytest.mark.parametrize("config", [ImageConfig(), ImageConfig(cmd=("",))])
def test_no_command_is_refused(config: ImageConfig) -> None:
    with pytest.raises(InvalidArgument, match="no command specified"):
        plan(pb.ContainerConfig(), image(config))


def test_a_wasm_artifact_needs_no_command() -> None:
    assert plan(pb.ContainerConfig(args=["a"]), image(ImageConfig(), wasm=True)).args == ("module.wasm", "a")


def test_nul_in_arguments_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="NUL"):
        plan(pb.ContainerConfig(command=["a\0b"]))


def test_environment_order_and_defaults() -> None:
    of = image(ImageConfig(cmd=("x",), env=("A=image", "B=image", "broken", "=broken")))
    config = pb.ContainerConfig(
        envs=[pb.KeyValue(key="B", value=b"request"), pb.KeyValue(key="C", value="ünï=1".encode())]
    )
    assert plan(config, of).env == (
        f"PATH={DEFAULT_PATH}",
        "HOSTNAME=pod-name",
        "HOME=/root",
        "A=image",
        "B=request",
        "broken=",
        "C=ünï=1",
    )


def test_the_clients_variables_win_over_ours() -> None:
    names = ("PATH", "HOSTNAME", "HOME", "TERM")
    config = pb.ContainerConfig(envs=[pb.KeyValue(key=name, value=b"mine") for name in names], tty=True)
    assert set(plan(config).env) == {f"{name}=mine" for name in names}


def test_a_terminal_has_a_type() -> None:
    assert "TERM=xterm" in plan(pb.ContainerConfig(tty=True)).env
    assert not any(variable.startswith("TERM=") for variable in plan(pb.ContainerConfig()).env)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("", b"x", "not a name"), ("A=B", b"", "not a name"), ("A", b"\xff", "not UTF-8"), ("A", b"a\0b", "NUL")],
)
def test_variables_that_cannot_be_passed_are_refused_by_name(key: str, value: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"envs: .*{words}"):
        plan(pb.ContainerConfig(envs=[pb.KeyValue(key=key, value=value)]))


@pytest.mark.parametrize(
    ("of_image", "asked", "expected"),
    [("", "", "/"), ("/srv", "", "/srv"), ("/srv", "/own", "/own"), ("rel", "", "/rel")],
)
def test_working_directory(of_image: str, asked: str, expected: str) -> None:
    of = image(ImageConfig(cmd=("x",), working_dir=of_image))
    assert plan(pb.ContainerConfig(working_dir=asked), of).cwd == expected


def test_identity_and_streams() -> None:
    config = pb.ContainerConfig(tty=True, stdin=True, stdin_once=True)
    config.linux.security_context.run_as_user.value = 5
    made = plan(config)
    assert (made.user, made.tty, made.stdin, made.stdin_once) == (User(5, 0, (0,)), True, True, True)


@pytest.mark.parametrize(
    ("text", "number"),
    [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("SIGRTMIN", 34), ("SIGIOT", 6)],
)
def test_signals_are_parsed(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize(
    "text", ["", "SIGNOPE", "0", "65", "-9", "SIGRTMIN+40", "RTMAX+1", "SIG_DFL", "9x", "1" * 5000]
)
def test_what_is_no_signal_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not a signal"):
        parse_signal(text)


def test_every_signal_of_the_interface_has_a_number() -> None:
    named = [value for value in pb.Signal.values() if value]
    assert len({stop_signal(value, "") for value in named}) == len(named) - 3  # CLD, IOT and POLL are second names
    assert stop_signal(pb.Signal.SIGNAL_SIGRTMAXMINUS1, "") == 63
    assert stop_signal(pb.Signal.SIGNAL_SIGRTMINPLUS3, "") == 37


def test_signal_of_the_request_wins_over_the_images() -> None:
    assert stop_signal(pb.Signal.SIGNAL_SIGQUIT, "SIGINT") == 3
    assert stop_signal(pb.Signal.SIGNAL_RUNTIME_DEFAULT, "SIGINT") == 2
    assert stop_signal(pb.Signal.SIGNAL_RUNTIME_DEFAULT, "") == 15


def test_unknown_value_of_the_enum_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="stop_signal 999"):
        stop_signal(999, "")  # type: ignore[arg-type]
