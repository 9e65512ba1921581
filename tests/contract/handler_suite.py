"""What every handler promises (`cri_shim.model.handler.Handler`), as tests that any handler can be held against.

A test module makes a `Bench` in a fixture named `bench`, with its handler and its guest programs, and subclasses
`HandlerSuite`. Nothing here knows what the guest is written in. Invariant: only what a client would see decides.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from cri_shim.adapters.apparmor import AppArmor
from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.pace import pace_of_this_machine
from cri_shim.adapters.store import Store
from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.adapters.zygote import Zygote
from cri_shim.kernel import caps
from cri_shim.model.container import ContainerName, ContainerRecord, ContainerState, Exit, Reason, User
from cri_shim.model.errors import CriShimError
from cri_shim.model.handler import ContainerPlan, ExecRequest, Handler, PodContext, ProcessPlan
from cri_shim.model.ids import ContainerId, Digest, PodId, new_container_id, new_pod_id
from cri_shim.model.image import ImageRecord
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver
from tests.support.cri import read_log
from tests.support.leftovers import remove_cgroup

PATIENCE = 30.0
"""Seconds that anything here may take at most."""


class Guest(Protocol):
    """The programs that the suite runs, as arguments; and the image that they are in."""

    outlives_daemon: bool
    """Whether a container goes on when the handler is closed."""
    image: ImageRecord | None

    def rootfs(self, layout: Layout, container_id: ContainerId) -> Path | None:
        """Make the root file system, if the kind has one."""
        ...

    def exits(self, code: int) -> tuple[str, ...]:
        """Ends at once with this status."""
        ...

    def says(self, stdout: str, stderr: str) -> tuple[str, ...]:
        """Writes a line to each stream, and ends with 0."""
        ...

    def reveals(self, *words: str) -> tuple[str, ...]:
        """Writes a line `arg WORD` for each of `words`, a line `env NAME=VALUE` for each variable, and ends with 0."""
        ...

    def waits(self) -> tuple[str, ...]:
        """Writes the line `ready` and waits for ever; SIGTERM ends it."""
        ...

    def counts(self) -> tuple[str, ...]:
        """Writes a number per line for ever, 0 first, tens of them a second."""
        ...

    def is_broken(self) -> tuple[str, ...]:
        """Cannot be executed."""
        ...


class KeptModules(CompiledModules):
    """For tests of one another's modules, each compiled once for all: nothing is removed."""

    async def drop_unused(self, digests: Iterable[Digest]) -> None:  # type: ignore[explicit-override]  # Python 3.12
        """Keep them."""


@dataclass
class Bench:
    """A handler with what it needs, and what it has told."""

    layout: Layout
    guest: Guest
    make: Callable[[HandlerContext], Handler]
    cgroup_parent: str
    cgroups: Cgroups = field(default_factory=lambda: Cgroups(Cgroups.detect(), Driver.CGROUPFS))
    ends: dict[ContainerId, list[Exit]] = field(default_factory=dict)
    plans: list[ContainerPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = asyncio.Event()
        self.zygote = Zygote()
        self.layout.state.mkdir(parents=True, exist_ok=True)
        self.store = Store.open(self.layout.state / "state.db")
        self.modules = KeptModules(self.layout.wasm_cache, self.store.images)
        self.handler = self.make(self.context())
        self.pod = self._pod()

    def context(self) -> HandlerContext:
        return HandlerContext(
            layout=self.layout,
            cgroups=self.cgroups,
            zygote=self.zygote,
            user_namespaces=UserNamespaces(self.layout, self.zygote),
            modules=self.modules,
            conmon="conmon",
            limits={"oom_score_adj": 0},
            capabilities=caps.effective(),
            apparmor=AppArmor(),
            starts=pace_of_this_machine(),
            exited=self._exited,
        )

    def plan(self, args: tuple[str, ...], env: tuple[str, ...] = ()) -> ContainerPlan:
        container_id = new_container_id()
        bundle = self.layout.bundle(container_id)
        bundle.mkdir(mode=0o700, parents=True)
        log = self.layout.state / "logs" / f"{container_id[:8]}.log"
        log.parent.mkdir(exist_ok=True)
        config = pb.ContainerConfig(metadata=pb.ContainerMetadata(name="test"), log_path=log.name)
        config.linux.security_context.namespace_options.pid = pb.NamespaceMode.CONTAINER
        plan = ContainerPlan(
            id=container_id,
            pod=self.pod,
            config=config,
            process=ProcessPlan(args=args, env=("PATH=/bin", *env), cwd="/", user=User(0, 0, (0,))),
            image=self.guest.image,
            rootfs=self.guest.rootfs(self.layout, container_id),
            bundle=bundle,
            log_path=log,
            stop_signal=15,
        )
        self.plans.append(plan)
        return plan

    async def run(self, args: tuple[str, ...], env: tuple[str, ...] = ()) -> ContainerPlan:
        """Create and start."""
        plan = self.plan(args, env)
        await self.create_and_start(plan)
        return plan

    async def create_and_start(self, plan: ContainerPlan) -> None:
        await self.handler.create(plan)
        await self.handler.start(plan.id)

    async def end_of(self, plan: ContainerPlan) -> Exit:
        """Wait for the end that the handler tells."""
        async with asyncio.timeout(PATIENCE):
            while plan.id not in self.ends:
                self.changed.clear()
                await self.changed.wait()
        return self.ends[plan.id][0]

    async def is_ready(self, plan: ContainerPlan, line: str = "ready") -> None:
        await until(lambda: line in self.log(plan, "stdout"))

    def log(self, plan: ContainerPlan, stream: str) -> list[str]:
        assert plan.log_path is not None
        return (
            [line.text for line in read_log(plan.log_path) if line.stream == stream] if plan.log_path.exists() else []
        )

    def record(self, plan: ContainerPlan, *, started_at: int) -> ContainerRecord:
        """As the store would hold it."""
        return ContainerRecord(
            id=plan.id,
            pod_id=plan.pod.id,
            name=ContainerName("test"),
            config=plan.config.SerializeToString(),
            image_id=self.guest.image.id if self.guest.image else "",  # type: ignore[arg-type]
            image_ref="",
            image_name="",
            created_at=1,
            committed=True,
            started_at=started_at,
        )

    async def restart(self) -> None:
        """Another daemon takes the place of this one."""
        await self.handler.aclose()
        self.handler = self.make(self.context())

    async def aclose(self) -> None:
        for plan in self.plans:
            await self.handler.delete(plan.id, self.cgroup_parent)
        await self.handler.aclose()
        await self.zygote.aclose()
        self.store.close()
        remove_cgroup(self.cgroup_parent)

    def _exited(self, container_id: ContainerId, ended: Exit) -> None:
        self.ends.setdefault(container_id, []).append(ended)
        self.changed.set()

    def _pod(self) -> PodContext:
        pod_id: PodId = new_pod_id()
        directory = self.layout.pod(pod_id)
        (directory / "shm").mkdir(parents=True)
        for name in ("resolv.conf", "hosts", "hostname"):
            (directory / name).write_text(f"{name}\n")
        return PodContext(
            id=pod_id,
            config=pb.PodSandboxConfig(),
            hostname="pod",
            cgroup_parent=self.cgroup_parent,
            net=None,
            ipc=None,
            uts=None,
            pid=None,
            shm=directory / "shm",
            resolv_conf=directory / "resolv.conf",
            hosts=directory / "hosts",
            hostname_file=directory / "hostname",
        )


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


class HandlerSuite:
    """The promises. Subclass it beside a `bench` fixture."""

    @pytest.mark.parametrize(("code", "reason"), [(0, Reason.COMPLETED), (3, Reason.ERROR), (255, Reason.ERROR)])
    async def test_exit_is_told_once_with_code_reason_and_time(self, bench: Bench, code: int, reason: Reason) -> None:
        before = time.time_ns()
        plan = bench.plan(bench.guest.exits(code))
        await bench.handler.create(plan)
        started = await bench.handler.start(plan.id)
        ended = await bench.end_of(plan)
        assert (ended.code, ended.reason) == (code, reason)
        assert before <= started.at <= ended.at <= time.time_ns()
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        assert len(bench.ends[plan.id]) == 1

    async def test_nothing_runs_before_start(self, bench: Bench) -> None:
        plan = bench.plan(bench.guest.says("out", "err"))
        await bench.handler.create(plan)
        await asyncio.sleep(0.1)
        assert bench.log(plan, "stdout") == []
        assert bench.ends == {}
        await bench.handler.start(plan.id)
        await bench.end_of(plan)
        assert bench.log(plan, "stdout") == ["out"]

    async def test_both_streams_are_logged_by_name(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.says("to out", "to err"))
        assert (await bench.end_of(plan)).code == 0
        assert (bench.log(plan, "stdout"), bench.log(plan, "stderr")) == (["to out"], ["to err"])
        assert plan.log_path is not None
        assert plan.log_path.stat().st_mode & 0o777 == 0o640

    async def test_log_exists_when_start_returns(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        assert plan.log_path is not None
        assert plan.log_path.exists()

    async def test_no_log_path_is_fine(self, bench: Bench) -> None:
        plan = dataclasses.replace(bench.plan(bench.guest.says("a", "b")), log_path=None)
        await bench.handler.create(plan)
        await bench.handler.start(plan.id)
        assert (await bench.end_of(plan)).code == 0

    async def test_arguments_and_environment_arrive_unchanged(self, bench: Bench) -> None:
        words = ("two words", "", "ünï", "--flag=1", "a'b\"c")
        plan = await bench.run(bench.guest.reveals(*words), ("A=1", "B=x = y", "C="))
        await bench.end_of(plan)
        said = bench.log(plan, "stdout")
        assert [line for line in said if line.startswith("arg ")] == [f"arg {word}" for word in words]
        assert {"env A=1", "env B=x = y", "env C="} <= set(said)

    async def test_sigkill_is_137_and_repeats_are_fine(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        await bench.handler.kill(plan.id, signal.SIGKILL, everyone=True)
        ended = await bench.end_of(plan)
        assert (ended.code, ended.reason) == (137, Reason.ERROR)
        await bench.handler.kill(plan.id, signal.SIGKILL)
        await bench.handler.kill(plan.id, signal.SIGKILL, everyone=True)
        assert len(bench.ends[plan.id]) == 1

    async def test_sigterm_ends_a_guest_that_heeds_it(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        await bench.handler.kill(plan.id, signal.SIGTERM)
        assert (await bench.end_of(plan)).code == 143

    async def test_kill_and_delete_of_an_unknown_container_are_success(self, bench: Bench) -> None:
        await bench.handler.kill(new_container_id(), signal.SIGTERM)
        await bench.handler.delete(new_container_id(), bench.cgroup_parent)

    @pytest.mark.parametrize("state", [ContainerState.CREATED, ContainerState.RUNNING, ContainerState.EXITED])
    async def test_delete_works_from_every_state_and_twice(self, bench: Bench, state: ContainerState) -> None:
        plan = bench.plan(bench.guest.exits(0) if state is ContainerState.EXITED else bench.guest.waits())
        await bench.handler.create(plan)
        if state is not ContainerState.CREATED:
            await bench.handler.start(plan.id)
        if state is ContainerState.EXITED:
            await bench.end_of(plan)
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == []
        assert bench.handler.info(plan.id) == {}
        assert (plan.id in bench.ends) == (state is not ContainerState.CREATED)

    async def test_a_broken_program_is_a_named_error_and_leaves_nothing(self, bench: Bench) -> None:
        plan = bench.plan(bench.guest.is_broken())
        with pytest.raises(CriShimError) as caught:
            await bench.create_and_start(plan)
        assert caught.value.hint
        assert bench.ends == {}
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == []

    async def test_start_of_an_unknown_container_is_an_error(self, bench: Bench) -> None:
        with pytest.raises(CriShimError):
            await bench.handler.start(new_container_id())

    async def test_reopened_log_takes_new_lines_and_loses_none(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.counts())
        await bench.is_ready(plan, "5")
        assert plan.log_path is not None
        rotated = plan.log_path.with_suffix(".1")
        plan.log_path.rename(rotated)
        await bench.handler.reopen_log(plan.id)
        assert plan.log_path.stat().st_mode & 0o777 == 0o640
        size = rotated.stat().st_size
        await until(lambda: len(bench.log(plan, "stdout")) > 5)
        assert rotated.stat().st_size == size
        numbers = [int(line.text) for path in (rotated, plan.log_path) for line in read_log(path)]
        assert numbers == list(range(len(numbers)))

    async def test_many_at_once(self, bench: Bench) -> None:
        plans = await asyncio.gather(*(bench.run(bench.guest.exits(code)) for code in range(8)))
        assert [(await bench.end_of(plan)).code for plan in plans] == list(range(8))

    async def test_next_daemon_takes_over_what_runs(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        await bench.restart()
        found = await bench.handler.adopt(bench.record(plan, started_at=5), plan)
        if not bench.guest.outlives_daemon:
            assert isinstance(found, Exit)
            assert (found.code, found.reason) == (255, Reason.UNKNOWN)
            assert found.message
            return
        assert found is None
        assert bench.ends == {}
        await bench.handler.kill(plan.id, signal.SIGTERM)
        assert (await bench.end_of(plan)).code == 143

    async def test_next_daemon_learns_an_end_that_it_did_not_see(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.exits(7))
        await bench.end_of(plan)
        await bench.restart()
        found = await bench.handler.adopt(bench.record(plan, started_at=5), plan)
        assert isinstance(found, Exit)
        assert found.code == (7 if bench.guest.outlives_daemon else 255)
        assert len(bench.ends[plan.id]) == 1


class ExecSuite:
    """The promises of a handler that can exec. `nested` is a program whose children's children wait for ever."""

    nested: tuple[str, ...]

    async def test_exec_returns_status_and_output(self, bench: Bench, tmp_path: Path) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        code, out, err = await self.execute(bench, plan, bench.guest.says("one", "two"), tmp_path)
        assert (code, out, err) == (0, "one\n", "two\n")
        code, _, _ = await self.execute(bench, plan, bench.guest.exits(9), tmp_path)
        assert code == 9
        assert plan.id not in bench.ends

    async def test_killed_exec_leaves_no_descendant(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        before = bench.cgroups.processes(bench.cgroup_parent, plan.id)
        session = await bench.handler.exec(plan.id, ExecRequest(self.nested, None, 1, 2))
        await until(lambda: len(bench.cgroups.processes(bench.cgroup_parent, plan.id)) > len(before) + 1)
        await session.kill()
        assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == before
        assert await session.wait() == 137

    async def test_exec_of_a_missing_program_is_an_error(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        with pytest.raises(CriShimError, match="nowhere"):
            await bench.handler.exec(plan.id, ExecRequest(("/nowhere",), None, 1, 2))

    async def test_exec_in_a_container_that_does_not_run_is_an_error(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.exits(0))
        await bench.end_of(plan)
        with pytest.raises(CriShimError, match="not running"):
            await bench.handler.exec(plan.id, ExecRequest(bench.guest.exits(0), None, 1, 2))

    @staticmethod
    async def execute(bench: Bench, plan: ContainerPlan, args: tuple[str, ...], tmp_path: Path) -> tuple[int, str, str]:
        out, err = tmp_path / "out", tmp_path / "err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            request = ExecRequest(args, None, stdout.fileno(), stderr.fileno())
            session = await bench.handler.exec(plan.id, request)
        return await session.wait(), out.read_text(), err.read_text()
