"""The wasmtime handler with the real engine and the real zygote. No root needed, but where a test says so."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.zygote import Zygote
from cri_shim.kernel import mounts
from cri_shim.model.container import ContainerName, ContainerRecord, Exit, Reason, User
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from cri_shim.model.handler import ContainerPlan, ExecRequest, Kind, PodContext, ProcessPlan
from cri_shim.model.ids import ContainerId, Digest, ImageId, PodId, new_container_id, new_pod_id
from cri_shim.model.image import ImageConfig, ImageRecord, Platform, WasmModule
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS
from cri_shim.spec.security import KNOWN_CAPABILITIES
from handlers import wasmtime as kind
from tests.support import wasm

ALL_CAPABILITIES = frozenset(KNOWN_CAPABILITIES)


def sha256(data: bytes) -> Digest:
    import hashlib

    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


@dataclass
class Node:
    """A handler, and what the rest of a daemon would do around it."""

    layout: Layout
    zygote: Zygote
    capabilities: frozenset[str] = frozenset()
    exits: dict[ContainerId, list[Exit]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        for directory in (self.layout.images / "blobs" / "sha256", self.layout.bundles, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        self.handler = self.new_handler()

    def new_handler(self) -> Any:
        context = HandlerContext(
            layout=self.layout,
            cgroups=Cgroups(Cgroups.detect(), Driver.CGROUPFS),
            zygote=self.zygote,
            conmon="conmon",
            limits={"oom_score_adj": 0},
            capabilities=self.capabilities,
            exited=self.exited,
        )
        return kind.make("wasm", kind.OPTIONS(), context)

    def exited(self, container_id: ContainerId, ended: Exit) -> None:
        self.exits.setdefault(container_id, []).append(ended)
        self.changed.set()

    @property
    def logs(self) -> Path:
        return self.layout.state / "logs"

    def plan(self, module: str | bytes, *args: str, env: Sequence[str] = (), **config: Any) -> ContainerPlan:
        """A container of an artifact; the module is put where a pull would."""
        container_id = new_container_id()
        code = wasm.assemble(module) if isinstance(module, str) else module
        digest = sha256(code)
        self.layout.blob(digest).write_bytes(code)
        bundle = self.layout.bundle(container_id)
        bundle.mkdir(mode=0o700)
        return ContainerPlan(
            id=container_id,
            pod=self.pod(),
            config=pb.ContainerConfig(**config),
            process=ProcessPlan(args=args or ("module.wasm",), env=tuple(env), cwd="/", user=User()),
            image=image(digest, len(code)),
            rootfs=None,
            bundle=bundle,
            log_path=self.logs / f"{container_id}.log",
            stop_signal=signal.SIGTERM,
        )

    def pod(self) -> PodContext:
        nothing = self.layout.state / "none"
        return PodContext(
            id=new_pod_id(),
            config=pb.PodSandboxConfig(),
            hostname="pod",
            cgroup_parent="",
            net=None,
            ipc=None,
            uts=None,
            pid=None,
            shm=nothing,
            resolv_conf=nothing,
            hosts=nothing,
            hostname_file=nothing,
        )

    async def start(self, plan: ContainerPlan) -> ContainerId:
        await self.handler.create(plan)
        await self.handler.start(plan.id)
        return plan.id

    async def run(self, plan: ContainerPlan) -> Exit:
        return await self.ended(await self.start(plan))

    async def ended(self, container_id: ContainerId) -> Exit:
        async with asyncio.timeout(30):
            while container_id not in self.exits:
                self.changed.clear()
                await self.changed.wait()
        return self.exits[container_id][0]

    def log(self, container_id: ContainerId) -> list[tuple[str, str, str]]:
        """Stream, tag and text of each entry."""
        lines = (self.logs / f"{container_id}.log").read_text().splitlines()
        return [(stream, tag, text) for _, stream, tag, text in (line.split(" ", 3) for line in lines)]

    def text(self, container_id: ContainerId) -> list[str]:
        return [text for _, _, text in self.log(container_id)]

    async def said(self, container_id: ContainerId, text: str) -> None:
        async with asyncio.timeout(30):
            while text not in (self.logs / f"{container_id}.log").read_text():
                await asyncio.sleep(0.001)


def image(digest: Digest, size: int) -> ImageRecord:
    return ImageRecord(
        id=ImageId(digest),
        manifest=digest,
        index=None,
        config_digest=digest,
        size=size,
        platform=Platform("wasi", "wasm"),
        config=ImageConfig(),
        pulled_at=1,
        wasm=WasmModule(digest, "application/wasm", size),
    )


def limited(memory: int) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=memory))


def secured(**fields: Any) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules are compiled once for all tests."""
    return tmp_path_factory.mktemp("root")


MakeNode = Callable[..., Node]


@pytest.fixture
async def make_node(shared_root: Path, tmp_path: Path) -> AsyncIterator[MakeNode]:
    zygote = Zygote()
    nodes: list[Node] = []

    def make(root: Path = shared_root, capabilities: frozenset[str] = frozenset()) -> Node:
        nodes.append(Node(Layout(root, tmp_path / "state"), zygote, capabilities))
        return nodes[-1]

    yield make
    for node in nodes:
        await node.handler.aclose()
    await zygote.aclose()


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    return make_node()


# What a guest is given.


async def test_hello_is_in_the_log_when_the_exit_is_told(node: Node) -> None:
    plan = node.plan(wasm.HELLO)
    before = time.time_ns()
    ended = await node.run(plan)
    assert (ended.code, ended.reason, ended.message) == (0, Reason.COMPLETED, "")
    assert before < ended.at <= time.time_ns()
    assert node.log(plan.id) == [("stdout", "F", "hello from wasm")]


async def test_arguments_and_environment_arrive_as_they_are(node: Node) -> None:
    plan = node.plan(wasm.ECHO, "app.wasm", "-v", "two words", "", "größe", env=["A=1", "EMPTY=", "B=x=y"])
    await node.run(plan)
    assert node.text(plan.id) == ["app.wasm", "-v", "two words", "", "größe", "A=1", "EMPTY=", "B=x=y"]


async def test_the_working_directory_is_told_as_pwd(node: Node) -> None:
    plan = node.plan(wasm.ECHO, "m")
    plan = replace(plan, process=replace(plan.process, cwd="/srv", env=("A=1",)))
    await node.run(plan)
    assert node.text(plan.id) == ["m", "A=1", "PWD=/srv"]


async def test_streams_and_the_unterminated_line(node: Node) -> None:
    plan = node.plan(wasm.STDERR)
    await node.run(plan)
    log = node.log(plan.id)
    assert sorted(log) == [("stderr", "F", "to stderr"), ("stdout", "F", "to stdout"), ("stdout", "P", "no newline")]
    assert log[-1] == ("stdout", "P", "no newline")


async def test_standard_input_is_at_its_end(node: Node) -> None:
    assert (await node.run(node.plan(wasm.STDIN))).code == 0


async def test_no_log_path_is_no_log(node: Node) -> None:
    plan = replace(node.plan(wasm.floods(10_000)), log_path=None)
    assert (await node.run(plan)).code == 0
    assert list(node.logs.iterdir()) == []


async def test_another_function_of_a_library(node: Node) -> None:
    plan = node.plan(wasm.LIBRARY, "lib.wasm#serve")
    assert (await node.run(plan)).code == 0
    assert node.text(plan.id) == ["initialised"]


async def test_sleeping_takes_the_time_of_the_guests_own_clock(node: Node) -> None:
    assert (await node.run(node.plan(wasm.CLOCK))).code == 0


async def test_wrong_arguments_of_poll_oneoff_are_errors_of_the_call(node: Node) -> None:
    assert (await node.run(node.plan(wasm.BAD_POLL))).code == 0


# How it ends.


@pytest.mark.parametrize(("asked", "code"), [(0, 0), (1, 1), (7, 7), (126, 126), (137, 137), (255, 255), (300, 44)])
async def test_exit_codes(node: Node, asked: int, code: int) -> None:
    plan = node.plan(wasm.exits(asked))
    ended = await node.run(plan)
    assert (ended.code, ended.reason) == (code, Reason.ERROR if code else Reason.COMPLETED)
    assert node.log(plan.id) == []


async def test_a_trap_is_134_with_the_backtrace_in_message_and_log(node: Node) -> None:
    plan = node.plan(wasm.TRAP)
    ended = await node.run(plan)
    assert (ended.code, ended.reason) == (134, Reason.ERROR)
    assert "wasm backtrace" in ended.message
    assert "!deeper" in ended.message
    assert "`unreachable`" in ended.message
    assert [stream for stream, _, _ in node.log(plan.id)] == ["stderr"] * len(ended.message.splitlines())
    assert node.text(plan.id) == ended.message.splitlines()


async def test_a_trap_in_the_modules_own_start_is_the_same(node: Node) -> None:
    assert (await node.run(node.plan(wasm.STARTS_AT_ONCE))).code == 134


async def test_endless_recursion_is_a_trap_and_no_crash(node: Node) -> None:
    ended = await node.run(node.plan(wasm.RECURSE))
    assert ended.code == 134
    assert "stack" in ended.message


@pytest.mark.parametrize("guest", [wasm.HOG, wasm.HUGE], ids=["grows", "huge from the start"])
async def test_memory_limit_is_oom_killed(node: Node, guest: str) -> None:
    ended = await node.run(node.plan(guest, linux=limited(10 << 20)))
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


async def test_memory_limit_of_the_pod_holds_where_the_container_has_none(node: Node) -> None:
    plan = node.plan(wasm.HUGE)
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=10 << 20)
    config = pb.PodSandboxConfig(linux=pb.LinuxPodSandboxConfig(resources=resources))
    ended = await node.run(replace(plan, pod=replace(plan.pod, config=config)))
    assert ended.reason is Reason.OOM_KILLED


async def test_a_trap_below_the_limit_is_not_out_of_memory(node: Node) -> None:
    ended = await node.run(node.plan(wasm.TRAP, linux=limited(10 << 20)))
    assert (ended.code, ended.reason) == (134, Reason.ERROR)


@pytest.mark.parametrize("guest", [wasm.SPIN, wasm.SLEEP, wasm.floods(0)], ids=["busy", "asleep", "writing"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_a_signal_ends_it_at_once(node: Node, guest: str, number: int) -> None:
    container = await node.start(node.plan(guest))
    await asyncio.sleep(0.02)
    before = time.monotonic()
    await node.handler.kill(container, number)
    ended = await node.ended(container)
    assert (ended.code, ended.reason, ended.message) == (128 + number, Reason.ERROR, "")
    assert time.monotonic() - before < 1


async def test_a_signal_before_it_runs(node: Node) -> None:
    for _ in range(20):
        plan = node.plan(wasm.SPIN)
        await node.handler.create(plan)
        starting = asyncio.create_task(node.handler.start(plan.id))
        await asyncio.sleep(0)
        await node.handler.kill(plan.id, signal.SIGKILL)
        await starting
        assert (await node.ended(plan.id)).code == 137


async def test_only_the_first_signal_counts(node: Node) -> None:
    container = await node.start(node.plan(wasm.SLEEP))
    await node.handler.kill(container, signal.SIGTERM)
    await node.handler.kill(container, signal.SIGKILL)
    assert (await node.ended(container)).code == 143


@pytest.mark.parametrize("number", [0, signal.SIGCHLD, signal.SIGWINCH, signal.SIGSTOP, signal.SIGCONT])
async def test_signals_that_end_nothing(node: Node, number: int) -> None:
    container = await node.start(node.plan(wasm.SLEEP))
    await node.handler.kill(container, number)
    await asyncio.sleep(0.05)
    assert container not in node.exits


async def test_the_stop_signal_ends_it_whatever_it_is(node: Node) -> None:
    container = await node.start(replace(node.plan(wasm.SLEEP), stop_signal=signal.SIGWINCH))
    await node.handler.kill(container, signal.SIGWINCH)
    assert (await node.ended(container)).code == 128 + signal.SIGWINCH


async def test_killing_what_does_not_run_is_success(node: Node) -> None:
    await node.handler.kill(new_container_id(), signal.SIGTERM)
    plan = node.plan(wasm.HELLO)
    await node.handler.create(plan)
    await node.handler.kill(plan.id, signal.SIGKILL)
    assert plan.id not in node.exits
    await node.handler.start(plan.id)
    assert (await node.ended(plan.id)).code == 0
    await node.handler.kill(plan.id, signal.SIGKILL)


# Many at once.


async def test_two_hundred_guests_each_get_their_own_end(node: Node) -> None:
    wanted: dict[ContainerId, int] = {}
    for number in range(200):
        match number % 4:
            case 0:
                plan, code = node.plan(wasm.sleeps_then_exits(50, number % 256)), number % 256
            case 1:
                plan, code = node.plan(wasm.exits(number)), number
            case 2:
                plan, code = node.plan(wasm.TRAP), 134
            case _:
                plan, code = node.plan(wasm.SPIN if number % 8 == 3 else wasm.SLEEP), 143
        await node.handler.create(plan)
        wanted[plan.id] = code
    await asyncio.gather(*(node.handler.start(container) for container in wanted))
    await asyncio.gather(*(node.handler.kill(c, signal.SIGTERM) for c, code in wanted.items() if code == 143))
    ended = {container: await node.ended(container) for container in wanted}
    assert {container: end.code for container, end in ended.items()} == wanted
    assert all("!deeper" in end.message for end in ended.values() if end.code == 134)
    assert all(len(told) == 1 for told in node.exits.values())


async def test_a_busy_guest_does_not_hold_up_the_event_loop(node: Node) -> None:
    await node.start(node.plan(wasm.SPIN))
    await node.start(node.plan(wasm.floods(0)))
    slowest = 0.0
    for _ in range(50):
        before = time.monotonic()
        await asyncio.sleep(0.002)
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 0.5


async def test_nothing_is_left_of_a_guest(node: Node) -> None:
    async def round_trip() -> None:
        for guest in (wasm.HELLO, wasm.TRAP, wasm.exits(3)):
            plan = node.plan(guest)
            await node.run(plan)
            await node.handler.delete(plan.id, "")
            assert list(plan.bundle.iterdir()) == []

    await round_trip()
    before = thread_count(), descriptors()
    for _ in range(5):
        await round_trip()
    await asyncio.sleep(0.05)
    assert (thread_count(), descriptors()) == before


async def test_guests_run_at_a_lower_weight_and_under_their_name(node: Node) -> None:
    container = await node.start(node.plan(wasm.SPIN))
    (task,) = [
        t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text().strip() == f"wasm-{container[:10]}"
    ]
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    assert int(fields[16]) - os.getpriority(os.PRIO_PROCESS, 0) == 5
    assert os.sched_getscheduler(int(task.name)) == os.SCHED_BATCH


# Starting, removing, adopting.


async def test_errors_of_linking_are_errors_of_the_start(node: Node) -> None:
    for module, args, words in (
        (wasm.UNKNOWN_IMPORT, ("m",), "cannot be linked.*env::launch"),
        (wasm.LIBRARY, ("m",), "exports no function '_start'"),
        (wasm.LIBRARY, ("m#nothing",), "exports no function 'nothing'"),
        (wasm.LIBRARY, ("m#needs",), "takes parameters"),
    ):
        plan = node.plan(module, *args)
        await node.handler.create(plan)
        with pytest.raises(FailedPrecondition, match=words):
            await node.handler.start(plan.id)
        await node.handler.delete(plan.id, "")
        assert plan.id not in node.exits


async def test_a_log_that_cannot_be_opened_is_an_error_of_the_start(node: Node) -> None:
    plan = replace(node.plan(wasm.HELLO), log_path=node.logs / "missing" / "log")
    await node.handler.create(plan)
    before = descriptors()
    with pytest.raises(FailedPrecondition, match=r"cannot open the container's log .*/missing/log: No such file"):
        await node.handler.start(plan.id)
    assert descriptors() == before


async def test_unknown_and_repeated_starts(node: Node) -> None:
    with pytest.raises(NotFound):
        await node.handler.start(new_container_id())
    container = await node.start(node.plan(wasm.SLEEP))
    with pytest.raises(FailedPrecondition, match="has been started before"):
        await node.handler.start(container)


async def test_delete_kills_and_is_repeatable(node: Node) -> None:
    await node.handler.delete(new_container_id(), "")
    plan = node.plan(wasm.SLEEP)
    await node.start(plan)
    await node.handler.delete(plan.id, "")
    await node.handler.delete(plan.id, "")
    assert [ended.code for ended in node.exits[plan.id]] == [137]
    assert list(plan.bundle.iterdir()) == []


async def test_exec_is_named_as_not_supported(node: Node) -> None:
    container = await node.start(node.plan(wasm.SLEEP))
    with pytest.raises(Unimplemented, match="ExecSync into a Wasm container"):
        await node.handler.exec(container, ExecRequest(("ls",), None, 1, 2))


async def test_reopened_log(node: Node) -> None:
    container = await node.start(node.plan(wasm.floods(0)))
    log = node.logs / f"{container}.log"
    rotated = log.rename(log.with_suffix(".1"))
    await node.handler.reopen_log(container)
    size = rotated.stat().st_size
    await node.said(container, "xxx")
    assert rotated.stat().st_size == size
    await node.handler.kill(container, signal.SIGKILL)
    await node.ended(container)
    with pytest.raises(FailedPrecondition, match="not running"):
        await node.handler.reopen_log(container)


def record_of(plan: ContainerPlan, **facts: int) -> ContainerRecord:
    return ContainerRecord(
        id=plan.id,
        pod_id=PodId("p"),
        name=ContainerName("n"),
        config=b"",
        image_id=ImageId("sha256:0"),
        image_ref="",
        image_name="",
        created_at=1,
        committed=True,
        stop_signal=signal.SIGQUIT,
        **facts,
    )


async def test_a_later_daemon_finds_created_containers_and_has_lost_running_ones(node: Node) -> None:
    created, running = node.plan(wasm.ECHO, "m", "arg", env=["A=1"]), node.plan(wasm.SLEEP)
    await node.handler.create(created)
    await node.start(running)
    await node.handler.aclose()
    assert node.exits == {}

    node.handler = node.new_handler()
    forgotten = ProcessPlan(args=(), env=(), cwd="/", user=User())
    assert await node.handler.adopt(record_of(created), replace(created, process=forgotten)) is None
    lost = await node.handler.adopt(record_of(running, started_at=2), replace(running, process=forgotten))
    assert (lost.code, lost.reason) == (255, Reason.UNKNOWN)
    assert "daemon restarted" in lost.message

    await node.handler.start(created.id)
    assert (await node.ended(created.id)).code == 0
    assert node.text(created.id) == ["m", "arg", "A=1"]
    await node.handler.delete(running.id, "")


async def test_a_created_container_whose_preparation_is_gone_is_lost(node: Node) -> None:
    plan = node.plan(wasm.HELLO)
    lost = await node.handler.adopt(record_of(plan), plan)
    assert (lost.code, lost.reason) == (255, Reason.UNKNOWN)


async def test_closing_ends_five_hundred_guests_within_a_second(node: Node) -> None:
    plans = [node.plan(wasm.SLEEP) for _ in range(500)]
    for plan in plans:
        await node.handler.create(plan)
    for plan in plans:
        await node.handler.start(plan.id)
    before = time.monotonic()
    await node.handler.aclose()
    assert time.monotonic() - before < 1
    assert node.exits == {}


async def test_verbose_status(node: Node) -> None:
    plan = node.plan(wasm.SLEEP, linux=limited(64 << 20))
    await node.start(plan)
    info = node.handler.info(plan.id)
    assert info["placement"] == "in-process"
    assert info["memoryLimit"] == 64 << 20
    assert msgspec.json.decode(msgspec.json.encode(info)) == info
    assert node.handler.info(new_container_id()) == {}


# The compiled module.


async def test_a_module_is_compiled_once_for_all_who_ask(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(tmp_path / "fresh")
    plans = [node.plan(wasm.HELLO) for _ in range(8)]
    runs = 0
    original = node.zygote.run

    async def counted(*args: Any, **named: Any) -> dict[str, Any]:
        nonlocal runs
        runs += 1
        return await original(*args, **named)

    node.zygote.run = counted  # type: ignore[method-assign]
    await asyncio.gather(*(node.handler.create(plan) for plan in plans))
    assert runs == 1
    (compiled,) = (tmp_path / "fresh" / "wasm").rglob("*.cwasm")
    assert compiled.stat().st_mode & 0o777 == 0o600
    assert [path.stat().st_mode & 0o777 for path in (compiled.parent, compiled.parent.parent)] == [0o700, 0o700]


async def test_a_caller_who_leaves_does_not_stop_the_compiler_for_others(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(tmp_path / "fresh")
    impatient, patient = node.plan(wasm.HELLO), node.plan(wasm.HELLO)
    first = asyncio.create_task(node.handler.create(impatient))
    second = asyncio.create_task(node.handler.create(patient))
    await asyncio.sleep(0.01)
    first.cancel()
    await second
    await node.handler.start(patient.id)
    assert (await node.ended(patient.id)).code == 0


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (b"\0asm\x01\0\0\0\x01\x02garbage", "cannot be compiled"),
        (wasm.assemble(wasm.HELLO)[:-3], "cannot be compiled"),
        (wasm.SHARED_MEMORY, "threads must be enabled"),
        (wasm.TWO_MEMORIES, "multiple memories"),
        (b"\0asm\x07\0\0\0", "version 7"),
        (b"\x7fELF\x02\x01\x01\0", "native code"),
        (b"(module)", "Wasm text"),
        (b"#!/bin/sh\n", "not a Wasm module"),
        (b"", "not a Wasm module"),
    ],
)
async def test_what_is_no_module_is_refused_by_name(node: Node, module: str | bytes, words: str) -> None:
    plan = node.plan(module)
    with pytest.raises(InvalidArgument, match=words):
        await node.handler.create(plan)
    assert list(plan.bundle.iterdir()) == []


async def test_a_component_says_what_it_needs(node: Node) -> None:
    with pytest.raises(Unimplemented, match=r"component.*isolation: process"):
        await node.handler.create(node.plan(wasm.COMPONENT))


async def test_a_blob_that_is_gone_or_changed_is_an_error(node: Node) -> None:
    plan = node.plan(wasm.exits(99))
    assert plan.image is not None
    assert plan.image.wasm is not None
    blob = node.layout.blob(plan.image.wasm.digest)
    blob.write_bytes(wasm.assemble(wasm.HELLO))
    with pytest.raises(CriShimError, match="has changed"):
        await node.handler.create(plan)
    blob.unlink()
    with pytest.raises(FailedPrecondition, match="pull it again"):
        await node.handler.create(plan)


# Files.


async def test_a_directory_mount_is_written_through(node: Node, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    plan = node.plan(wasm.writes_file(3, "made", "by wasm"), mounts=[mount(volume, "/data")])
    assert (await node.run(plan)).code == 0
    assert (volume / "made").read_text() == "by wasm"


async def test_a_read_only_mount_is_read_only(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content\n")
    mounted = [mount(tmp_path, "/data", readonly=True)]
    assert (await node.run(node.plan(wasm.writes_file(3, "made", "x"), mounts=mounted))).code != 0
    assert not (tmp_path / "made").exists()
    plan = node.plan(wasm.prints_file(3, "file"), mounts=mounted)
    assert (await node.run(plan)).code == 0
    assert node.text(plan.id) == ["content"]


@pytest.mark.parametrize("path", ["../secret", "link", "absolute"])
async def test_there_is_no_way_out_of_a_mount(node: Node, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "link").symlink_to("../secret")
    (volume / "absolute").symlink_to(tmp_path / "secret")
    plan = node.plan(wasm.prints_file(3, path), mounts=[mount(volume, "/data")])
    assert (await node.run(plan)).code != 0
    assert node.log(plan.id) == []


async def test_a_missing_mount_source_becomes_a_directory(node: Node, tmp_path: Path) -> None:
    plan = node.plan(wasm.writes_file(3, "made", "x"), mounts=[mount(tmp_path / "new" / "one", "/data")])
    assert (await node.run(plan)).code == 0
    assert (tmp_path / "new" / "one" / "made").exists()


async def test_a_read_only_file_mount_without_root_is_a_copy(node: Node, tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("a = 1\n")
    plan = node.plan(
        wasm.prints_file(3, "settings.ini"), mounts=[mount(tmp_path / "settings", "/etc/settings.ini", readonly=True)]
    )
    await node.run(plan)
    assert node.text(plan.id) == ["a = 1"]
    await node.handler.delete(plan.id, "")
    assert list(plan.bundle.iterdir()) == []


def mount(source: Path, target: str, *, readonly: bool = False) -> pb.Mount:
    return pb.Mount(host_path=str(source), container_path=target, readonly=readonly)


def refused_mounts(tmp_path: Path) -> Iterator[tuple[pb.Mount, str]]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    yield mount(tmp_path / "fifo", "/f"), "neither a directory nor a file"
    yield mount(tmp_path / "file", "/f"), "single writable file needs root"
    yield mount(tmp_path, "/"), "not a path below /"
    yield pb.Mount(host_path=str(tmp_path), container_path="/f", mount_options=["noexec"]), "mount_options of /f"
    yield pb.Mount(host_path=str(tmp_path), container_path="/f", uidMappings=[pb.IDMapping()]), "uidMappings of /f"
    yield pb.Mount(container_path="/f", image=pb.ImageSpec(image="x")), "image of /f: an image volume"
    bidirectional = pb.MountPropagation.PROPAGATION_BIDIRECTIONAL
    yield pb.Mount(host_path=str(tmp_path), container_path="/f", propagation=bidirectional), "BIDIRECTIONAL"


async def test_mounts_that_cannot_be_honoured_are_refused_by_name(node: Node, tmp_path: Path) -> None:
    for asked, words in refused_mounts(tmp_path):
        plan = node.plan(wasm.HELLO, mounts=[asked])
        with pytest.raises(CriShimError, match=words):
            await node.handler.create(plan)
        assert list(plan.bundle.iterdir()) == []


NODE, TARGET = pb.NamespaceMode.NODE, pb.NamespaceMode.TARGET
REFUSED: Mapping[str, dict[str, Any]] = {
    "tty": {"tty": True},
    "stdin": {"stdin": True},
    "devices": {"devices": [pb.Device(host_path="/dev/null")]},
    "CDI_devices": {"CDI_devices": [pb.CDIDevice(name="v/c=d")]},
    "annotations": {"annotations": {"cdi.k8s.io/x": "y"}},
    "privileged": {"linux": secured(privileged=True)},
    "pid: NODE": {"linux": secured(namespace_options=pb.NamespaceOption(pid=NODE))},
    "pid: TARGET": {"linux": secured(namespace_options=pb.NamespaceOption(pid=TARGET))},
    "ipc: NODE": {"linux": secured(namespace_options=pb.NamespaceOption(ipc=NODE))},
    "userns_options": {
        "linux": secured(
            namespace_options=pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.NamespaceMode.POD))
        )
    },
    "add_capabilities": {"linux": secured(capabilities=pb.Capability(add_capabilities=["NET_ADMIN"]))},
    "seccomp": {
        "linux": secured(seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="x"))
    },
    "apparmor": {"linux": secured(apparmor_profile="localhost/x")},
    "selinux_options": {"linux": secured(selinux_options=pb.SELinuxOption(type="t"))},
    "masked_paths": {"linux": secured(masked_paths=["/etc"])},
    "cpuset_cpus": {"linux": pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(cpuset_cpus="x"))},
}


@pytest.mark.parametrize("field", REFUSED)
async def test_fields_that_cannot_be_honoured_are_refused_by_name(node: Node, field: str) -> None:
    plan = node.plan(wasm.HELLO, **REFUSED[field])
    with pytest.raises(CriShimError, match=field):
        await node.handler.create(plan)
    assert list(plan.bundle.iterdir()) == []


async def test_fields_that_change_nothing_for_a_module_are_accepted(node: Node) -> None:
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    linux = secured(
        seccomp=default,
        apparmor=default,
        no_new_privs=True,
        masked_paths=["/proc/kcore", "/sys/firmware"],
        readonly_paths=["/proc/sys"],
        supplemental_groups=[7],
        capabilities=pb.Capability(add_capabilities=["NET_BIND_SERVICE"], drop_capabilities=["ALL"]),
        namespace_options=pb.NamespaceOption(network=NODE, pid=pb.NamespaceMode.CONTAINER),
    )
    linux.resources.CopyFrom(
        pb.LinuxContainerResources(cpu_shares=2, cpu_quota=5000, cpu_period=100000, oom_score_adj=-998, cpuset_cpus="0")
    )
    assert (await node.run(node.plan(wasm.HELLO, linux=linux))).code == 0


@pytest.mark.parametrize("uid", [65534, 0])
async def test_files_that_the_user_could_not_reach_are_refused(node: Node, tmp_path: Path, uid: int) -> None:
    """A uid that is not the daemon's; for a root daemon also root without the capability to pass over modes."""
    dropped = secured(capabilities=pb.Capability(drop_capabilities=["ALL"]))
    plan = node.plan(wasm.HELLO, mounts=[mount(tmp_path, "/data", readonly=True)], linux=dropped)
    plan = replace(plan, process=replace(plan.process, user=User(uid=uid)))
    if uid == 0 and os.geteuid() != 0:
        assert (await node.run(plan)).code == 0
        return
    with pytest.raises(Unimplemented, match=r"/data is a mount.*as (user 65534|root without DAC_OVERRIDE)"):
        await node.handler.create(plan)
    without = node.plan(wasm.HELLO, linux=dropped)
    assert (await node.run(replace(without, process=plan.process))).code == 0


# Ordinary images with a module in their root file system.


def with_rootfs(plan: ContainerPlan, rootfs: Path, *args: str, path: str = "/bin") -> ContainerPlan:
    assert plan.image is not None
    process = replace(plan.process, args=args, env=(f"PATH={path}",))
    return replace(plan, image=msgspec.structs.replace(plan.image, wasm=None), rootfs=rootfs, process=process)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    for directory in ("bin", "srv", "etc"):
        (root / directory).mkdir(parents=True)
    return root


@pytest.mark.parametrize("word", ["/srv/app.wasm", "srv/app.wasm", "app.wasm", "tool", "/link"])
async def test_the_module_is_looked_up_in_the_image(node: Node, rootfs: Path, word: str) -> None:
    code = wasm.assemble(wasm.ECHO)
    (rootfs / "srv/app.wasm").write_bytes(code)
    (rootfs / "bin/tool").write_bytes(code)
    (rootfs / "link").symlink_to("/srv/app.wasm")
    plan = with_rootfs(node.plan(wasm.HELLO), rootfs, word, "x")
    cwd = "/srv" if word == "app.wasm" else "/"
    plan = replace(plan, process=replace(plan.process, cwd=cwd, env=("PATH=/none:/bin",)))
    assert (await node.run(plan)).code == 0
    assert node.text(plan.id)[:2] == [word, "x"]


async def test_a_module_outside_of_the_image_is_not_found(node: Node, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.wasm").write_bytes(wasm.assemble(wasm.HELLO))
    (rootfs / "link").symlink_to(tmp_path / "outside.wasm")
    for word in ("../outside.wasm", "/link", "nothing", "/srv"):
        with pytest.raises(NotFound, match="not in the image"):
            await node.handler.create(with_rootfs(node.plan(wasm.HELLO), rootfs, word))


@pytest.mark.parametrize("readonly", [False, True])
async def test_the_root_file_system_is_the_guests_root(node: Node, rootfs: Path, readonly: bool) -> None:
    (rootfs / "bin/app").write_bytes(wasm.assemble(wasm.writes_file(3, "srv/made", "x")))
    plan = with_rootfs(node.plan(wasm.HELLO, linux=secured(readonly_rootfs=readonly)), rootfs, "app")
    assert ((await node.run(plan)).code == 0) is not readonly
    assert (rootfs / "srv/made").exists() is not readonly


# Single files as root: bind mounts, in the private namespace that scripts/test makes.


@pytest.mark.root
async def test_a_file_mount_of_an_artifact_is_the_file_itself(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node(capabilities=ALL_CAPABILITIES)
    (tmp_path / "log").touch()
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    mounted = [mount(tmp_path / "log", "/dev/termination-log"), mount(tmp_path / "hosts", "/etc/hosts", readonly=True)]
    plans = {
        "written": node.plan(wasm.writes_file(3, "termination-log", "bye"), mounts=mounted),
        "read": node.plan(wasm.prints_file(4, "hosts"), mounts=mounted),
        "not written": node.plan(wasm.writes_file(4, "hosts", "x"), mounts=mounted),
        "nothing else": node.plan(wasm.writes_file(3, "other", "x"), mounts=mounted),
    }
    codes = {name: (await node.run(plan)).code for name, plan in plans.items()}
    assert (codes["written"], codes["read"]) == (0, 0)
    assert codes["not written"] != 0
    assert codes["nothing else"] != 0
    assert (tmp_path / "log").read_text() == "bye"
    assert node.text(plans["read"].id) == ["127.0.0.1 localhost"]
    for plan in plans.values():
        await node.handler.delete(plan.id, "")
        assert list(plan.bundle.iterdir()) == []
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(node.layout.state)]


@pytest.mark.root
@pytest.mark.parametrize("readonly", [False, True])
async def test_a_file_mount_over_an_image(make_node: MakeNode, rootfs: Path, tmp_path: Path, readonly: bool) -> None:
    node = make_node(capabilities=ALL_CAPABILITIES)
    (tmp_path / "log").touch()
    (rootfs / "var").symlink_to("srv")
    (rootfs / "bin/app").write_bytes(wasm.assemble(wasm.writes_file(3, "var/new/termination-log", "bye")))
    (rootfs / "bin/other").write_bytes(wasm.assemble(wasm.writes_file(3, "etc/other", "x")))
    config = {
        "linux": secured(readonly_rootfs=readonly),
        "mounts": [mount(tmp_path / "log", "/var/new/termination-log")],
    }
    app = with_rootfs(node.plan(wasm.HELLO, **config), rootfs, "app")
    assert (await node.run(app)).code == 0
    assert (tmp_path / "log").read_text() == "bye"
    assert (rootfs / "srv/new/termination-log").read_text() == ""
    other = with_rootfs(node.plan(wasm.HELLO, **config), rootfs, "other")
    assert ((await node.run(other)).code == 0) is not readonly
    for plan in (app, other):
        await node.new_handler().delete(plan.id, "")  # by id alone, by a daemon that knows nothing
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(node.layout.state)]


# Options, and what the handler costs when nobody uses it.


def test_options_have_the_defaults_of_the_design() -> None:
    options = msgspec.convert({"kind": "wasmtime"}, kind.OPTIONS)
    assert options.linux_containers == "runc"
    assert options.allowed_annotations == DEFAULT_ALLOWED_ANNOTATIONS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"isolation": "process"}, "isolation: process is not supported by this version"),
        ({"isolation": "vm"}, "isolation"),
        ({"linux_container": "runc"}, "unknown field `linux_container`"),
    ],
)
def test_options_that_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert({"kind": "wasmtime", **settings}, kind.OPTIONS)


UNUSED = """
import sys, threading
from handlers import wasmtime as kind
from cri_shim.adapters.context import HandlerContext
from cri_shim.model.layout import Layout
from pathlib import Path
context = HandlerContext(Layout(Path("/r"), Path("/s")), None, None, "", {}, frozenset(), print)
handler = kind.make("wasm", kind.OPTIONS(), context)
assert "wasmtime" not in sys.modules, "loaded"
assert threading.active_count() == 1
"""


async def test_an_unused_handler_loads_no_engine_and_has_no_thread() -> None:
    import subprocess
    import sys

    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", UNUSED], check=True, timeout=60)


def test_kind_and_features(node: Node) -> None:
    assert node.handler.kind is Kind.WASM
    assert node.handler.features.recursive_read_only_mounts
    assert not node.handler.features.user_namespaces
