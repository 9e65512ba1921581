"""The `Handler` of OCI runtimes: a bundle, a conmon, and the runtime's verbs.

Not a keeper of state: what has to outlive the daemon is in the bundle, held by conmon. Invariant: every container that
was created has one watch on its conmon; the watch tells the end, and nothing else does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal as signals
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.adapters.attach import Attachments
from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.exec_session import OciExecSession, abandon, abandon_all, remember
from cri_shim.adapters.monitor import Files, Launch, Launched, Monitors, Supervised
from cri_shim.adapters.oci_runtime import Enter, ExecCall, Identity, OciRuntime, Streams
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.terminal import console_socket
from cri_shim.kernel import fs, pidfd, process
from cri_shim.log import get_logger
from cri_shim.model.container import ContainerRecord, Exit
from cri_shim.model.errors import CriShimError, NotFound, WrongState
from cri_shim.model.handler import (
    Attachment,
    ContainerPlan,
    ExecRequest,
    ExecSession,
    Features,
    HandlerStats,
    Kind,
    Started,
    TerminalRequest,
)
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import container as spec
from cri_shim.spec import resources, update
from cri_shim.spec.cgroup_plan import parent_of
from cri_shim.spec.facts import HostFacts, Json
from cri_shim.wire.oci_state import execute_error, runtime_error
from handlers.oci import facts
from handlers.oci.options import OciOptions

log = get_logger()

_SOON_SECONDS: Final = 2.0
_SCORE_PASSES: Final = 3


@dataclass(slots=True)
class _Container:
    """The live side of one container. `started_at` is 0 until it was started, `exit` None until it has ended."""

    supervised: Supervised
    command: tuple[str, ...]
    started_at: int = 0
    exit: Exit | None = None
    watch: asyncio.Task[None] | None = None
    execs: Iterator[int] = field(default_factory=itertools.count)
    attachments: Attachments = field(default_factory=Attachments)


@dataclass(frozen=True, slots=True)
class _Change:
    """What a runtime is told of new limits, and the score of the OOM killer; None = it stays."""

    limits: Json
    oom_score_adj: int | None


class OciHandler:
    """Runs Linux containers with one runtime."""

    kind = Kind.LINUX

    def __init__(
        self,
        name: str,
        runtime: OciRuntime,
        monitors: Monitors,
        context: HandlerContext,
        options: OciOptions,
        base_spec: Json,
    ) -> None:
        self.name = name
        self.features = Features()
        self._runtime = runtime
        self._monitors = monitors
        self._context = context
        self._options = options
        self._base_spec = base_spec
        self._containers: dict[ContainerId, _Container] = {}
        self._host: HostFacts | None = None
        self._clamped: set[str] = set()

    async def probe(self) -> None:
        """Ask the runtime what it is able to do, for `features`; the first `create` does it too."""
        if self._host is None:
            identity, _ = await asyncio.gather(self._runtime.identity(), self._context.apparmor.load())
            read = facts.host_facts
            host = await asyncio.to_thread(read, identity, self._context, self._options, self._base_spec)
            self.features = Features(
                recursive_read_only_mounts=host.recursive_read_only,
                no_user_namespaces=await self._no_user_namespaces(identity),
            )
            self._host = host

    async def _no_user_namespaces(self, identity: Identity) -> str:
        if not identity.features.user_namespaces:
            version = identity.version
            return f"{version.name} {version.version} has no idmapped mounts, which came with crun 1.9 and runc 1.2"
        return await self._context.user_namespaces.missing()

    async def create(self, plan: ContainerPlan) -> None:
        """Make the container; see `Handler`."""
        await self.probe()
        enter = await self._runtime.create_enter()
        try:
            profiles = await self._context.apparmor.profiles()
            async with self._context.starts.turn():
                launched = await asyncio.to_thread(self._launch, plan, enter, profiles)
                supervised = await self._monitors.created(launched, plan.process.args)
        except BaseException:
            # What cannot be deleted either is not the cause; the caller deletes again, and says so then.
            with contextlib.suppress(CriShimError, OSError):
                await to_the_end(self.delete(plan.id, plan.pod.cgroup_parent))
            raise
        self._watch(_Container(supervised, plan.process.args))

    async def start(self, container_id: ContainerId) -> Started:
        """Run the created container; see `Handler`."""
        container = self._known(container_id)
        files = container.supervised.launch.files
        try:
            async with self._context.starts.turn():
                await self._runtime.start(container_id, files.runtime_log, container.command)
            if not await self._monitors.executed(container.supervised):
                await self._raise_if_not_executed(container)
        except BaseException:
            await asyncio.to_thread(self._kill_all, container.supervised.launch)
            raise
        container.started_at = time.time_ns()
        if container.exit is not None:
            asyncio.get_running_loop().call_soon(self._tell, container)
        return Started(container.supervised.pid, container.started_at)

    async def update(
        self, container_id: ContainerId, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        """Change the limits, and the score of every process; see `Handler`."""
        container = self._known(container_id)
        there = await self._change(container, now, wanted)
        back = await self._change(container, wanted, now)
        try:
            await self._apply(container, there)
        except BaseException:
            if await self._ends_now(container):
                return
            with contextlib.suppress(CriShimError, OSError):  # the first error is the one to tell
                await to_the_end(self._apply(container, back))
            raise

    async def kill(self, container_id: ContainerId, signal: int, *, everyone: bool = False) -> None:
        """Signal the first process, or all; see `Handler`."""
        container = self._containers.get(container_id)
        if container is None or container.exit is not None:
            return
        if everyone:
            await asyncio.to_thread(self._signal_all, container.supervised.launch, signal)
        else:
            _signal_first(container.supervised, signal)

    async def delete(self, container_id: ContainerId, cgroup_parent: str) -> None:
        """Remove everything, from any state; see `Handler`."""
        container = self._containers.get(container_id)
        files = Files(self._context.layout.bundle(container_id))
        if container is None:
            cgroup_parent = cgroup_parent or await asyncio.to_thread(_cgroup_parent, files.config)
            await self._monitors.end(Launch(container_id, files, cgroup_parent, log_path=None))
        else:
            await self._monitors.end(container.supervised.launch, container.supervised.child)
            if container.watch is not None:
                await asyncio.wait([container.watch])  # so that the end was told before this returns
        async with self._context.starts.turn():
            await self._runtime.delete(container_id, files.runtime_log)
        await asyncio.to_thread(self._context.cgroups.remove, cgroup_parent, container_id)
        self._containers.pop(container_id, None)

    async def exec(self, container_id: ContainerId, request: ExecRequest | TerminalRequest) -> ExecSession:
        """Start a further process; see `Handler`."""
        async with self._context.starts.turn():
            starting = asyncio.ensure_future(self._exec(self._running(container_id), request))
            try:
                return await asyncio.shield(starting)
            except asyncio.CancelledError:
                with contextlib.suppress(Exception):
                    await asyncio.shield(_discard(await starting))
                raise

    async def attach(self, container_id: ContainerId, *, stdin: bool) -> Attachment:
        """Connect to conmon, which copies all output to every client; see `Handler`."""
        container = self._running(container_id)
        return await container.attachments.attach(container.supervised.launch, stdin=stdin)

    async def reopen_log(self, container_id: ContainerId) -> None:
        """See `Handler`."""
        launch = self._known(container_id).supervised.launch
        await asyncio.to_thread(self._monitors.reopen_log, launch)

    async def adopt(self, record: ContainerRecord, plan: ContainerPlan) -> Exit | Started | None:
        """Take over a container of an earlier daemon; see `Handler`."""
        launch = _launch_of(plan)
        found = await self._monitors.adopt(launch)
        if isinstance(found, Exit):
            return found
        await asyncio.to_thread(self._kill_execs, launch)
        container = _Container(found, plan.process.args, started_at=record.started_at)
        if not record.started_at and await self._runtime.is_running(plan.id, launch.files.runtime_log):
            container.started_at = time.time_ns()
        self._watch(container)
        return Started(found.pid, container.started_at) if container.started_at != record.started_at else None

    def info(self, container_id: ContainerId) -> Mapping[str, object]:
        """See `Handler`."""
        container = self._containers.get(container_id)
        if container is None:
            return {}
        supervised = container.supervised
        return {
            "pid": supervised.pid if container.exit is None else 0,
            "monitorPid": supervised.child.pid if container.exit is None else 0,
            "runtime": self._runtime.program,
            "bundle": str(supervised.launch.files.bundle),
        }

    def stats(self, container_id: ContainerId) -> HandlerStats | None:
        """See `Handler`."""
        del container_id
        return None

    async def aclose(self) -> None:
        """Stop watching; every container runs on."""
        watches = [container.watch for container in self._containers.values() if container.watch is not None]
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        for container in self._containers.values():
            container.supervised.child.close()
            container.attachments.close()
        self._containers.clear()
        await self._runtime.aclose()

    def _known(self, container_id: ContainerId) -> _Container:
        container = self._containers.get(container_id)
        if container is None:
            msg = f"container {container_id[:SHORT]} is not known to handler {self.name!r}"
            raise NotFound(msg)
        return container

    def _running(self, container_id: ContainerId) -> _Container:
        container = self._known(container_id)
        if not container.started_at or container.exit is not None:
            msg = f"container {container_id[:SHORT]} is not running"
            raise WrongState(msg)
        return container

    def _launch(self, plan: ContainerPlan, enter: Enter | None, profiles: frozenset[str]) -> Launched:
        """Read facts, write the bundle, start conmon: all that blocks, in one go."""
        assert self._host is not None  # noqa: S101  `create` has probed
        launch = _launch_of(plan)
        if plan.rootfs is None:
            self._context.layout.rootfs(plan.id).mkdir(exist_ok=True)  # an image without a layer
        problem = self._context.apparmor.problem
        found = facts.container_facts(plan, self._options, profiles, problem)
        document = spec.build(plan, self._host, found)
        self._say_what_was_clamped(plan)
        launch.files.config.write_bytes(msgspec.json.encode(document))
        return self._monitors.launch(launch, enter)

    def _say_what_was_clamped(self, plan: ContainerPlan) -> None:
        """Once for each thing: a node that runs with less rights does so for all its containers."""
        assert self._host is not None  # noqa: S101  `create` has probed
        for thing in spec.clamped(plan, self._host):
            if thing not in self._clamped:
                self._clamped.add(thing)
                log.warning("given less than asked: the daemon itself may not do more", handler=self.name, what=thing)

    def _watch(self, container: _Container) -> None:
        self._containers[container.supervised.launch.container_id] = container
        container.watch = asyncio.get_running_loop().create_task(self._until_exit(container))

    async def _raise_if_not_executed(self, container: _Container) -> None:
        """The first process is gone: raise if it never was the container's program."""
        if container.watch is not None:
            await asyncio.wait([container.watch], timeout=_SOON_SECONDS)
        words = await asyncio.to_thread(self._monitors.last_words, container.supervised.launch)
        said = execute_error(words, container.command[0] if container.command else "")
        if said and container.exit is not None and container.exit.code != 0:
            raise runtime_error("cannot start the container", said, container.command)

    async def _until_exit(self, container: _Container) -> None:
        container.exit = await self._monitors.ended(container.supervised)
        container.attachments.close()
        if container.started_at:
            self._tell(container)

    def _tell(self, container: _Container) -> None:
        if container.exit is not None:
            # A short-lived process can have ended before `start` took the time.
            at = max(container.exit.at, container.started_at)
            self._context.exited(
                container.supervised.launch.container_id, msgspec.structs.replace(container.exit, at=at)
            )

    async def _exec(self, container: _Container, request: ExecRequest | TerminalRequest) -> OciExecSession:
        launch = container.supervised.launch
        note = launch.files.bundle / "exec" / f"{next(container.execs)}.pid"
        try:
            # Here and not in a thread: it takes a tenth of a millisecond, which is less than the way there and back.
            call = _write_exec(launch, note, request)
            if isinstance(request, ExecRequest):
                streams = Streams(request.stdin, request.stdout, request.stderr)
                child = await self._runtime.exec(launch.container_id, call, streams)
                remember(note, child.pid)
                return OciExecSession(child, note)
            with console_socket(note.with_suffix(".tty")) as console:
                child = await self._runtime.exec(launch.container_id, replace(call, console=console.path), None)
                remember(note, child.pid)
                return OciExecSession(child, note, console.take())
        except BaseException:
            # A runtime that failed or was killed may have started the process before.
            await asyncio.to_thread(lambda: abandon(note, self._members(launch)))
            raise

    async def _change(
        self, container: _Container, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> _Change:
        await self.probe()
        assert self._host is not None  # noqa: S101  `probe` has set it
        launch = container.supervised.launch
        inherited = await asyncio.to_thread(
            self._context.cgroups.inherited_cpuset, launch.cgroup_parent, launch.container_id
        )
        score = resources.oom_score_adj(wanted, self._host) if wanted.oom_score_adj != now.oom_score_adj else None
        return _Change(update.change(now, wanted, self._host, inherited), score)

    async def _apply(self, container: _Container, change: _Change) -> None:
        launch = container.supervised.launch
        runtime_log = launch.files.runtime_log
        try:
            await self._runtime.update(launch.container_id, change.limits, runtime_log)
        except CriShimError:
            if not update.lifts_quota(change.limits):
                raise
            # crun 1.8 cannot write "no quota" on cgroup v1.
            await self._runtime.update(launch.container_id, update.without_quota(change.limits), runtime_log)
            await asyncio.to_thread(self._context.cgroups.lift_cpu_quota, launch.cgroup_parent, launch.container_id)
        if change.oom_score_adj is not None:
            await asyncio.to_thread(self._score, launch, change.oom_score_adj)

    def _score(self, launch: Launch, score: int) -> None:
        """For every process, also those that are exec'ed later."""
        document = msgspec.json.decode(launch.files.config.read_bytes())
        document["process"]["oomScoreAdj"] = score
        fs.atomic_write(launch.files.config, msgspec.json.encode(document), 0o600)
        scored: set[int] = set()
        for _ in range(_SCORE_PASSES):  # a child that was forked meanwhile has the score of before
            for pid in set(self._members(launch)) - scored:
                process.set_oom_score_adj(pid, score)
                scored.add(pid)

    async def _ends_now(self, container: _Container) -> bool:
        """Whether a call may have failed because the container has just ended."""
        if process.is_alive(container.supervised.pid, container.supervised.started):
            return False
        if container.watch is not None:
            await asyncio.wait([container.watch], timeout=_SOON_SECONDS)
        return container.exit is not None

    def _kill_all(self, launch: Launch) -> None:
        self._context.cgroups.kill_all(launch.cgroup_parent, launch.container_id)

    def _signal_all(self, launch: Launch, signal: int) -> None:
        if signal == signals.SIGKILL:
            self._kill_all(launch)
            return
        for pid in self._members(launch):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal)

    def _kill_execs(self, launch: Launch) -> None:
        abandon_all(launch.files.bundle / "exec", self._members(launch))

    def _members(self, launch: Launch) -> list[int]:
        return self._context.cgroups.processes(launch.cgroup_parent, launch.container_id)


def _launch_of(plan: ContainerPlan) -> Launch:
    return Launch(
        container_id=plan.id,
        files=Files(plan.bundle),
        cgroup_parent=plan.pod.cgroup_parent,
        log_path=plan.log_path,
        tty=plan.config.tty,
        stdin=plan.config.stdin,
        stdin_once=plan.config.stdin_once,
        owner=_owner(plan),
    )


def _owner(plan: ContainerPlan) -> tuple[int, int] | None:
    ids, user = plan.pod.ids, plan.process.user
    return (ids.uids.on_host(user.uid), ids.gids.on_host(user.gid)) if ids is not None else None


async def _discard(session: OciExecSession) -> None:
    if session.terminal >= 0:
        os.close(session.terminal)
    await session.kill()


def _cgroup_parent(config: Path) -> str:
    """The parent as the bundle has it, for a container whose pod nobody knows any more; empty without a bundle."""
    try:
        document = msgspec.json.decode(config.read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return ""
    return parent_of(document["linux"]["cgroupsPath"])


def _write_exec(launch: Launch, note: Path, request: ExecRequest | TerminalRequest) -> ExecCall:
    """The document of a further process, from that of the first one."""
    note.parent.mkdir(mode=0o700, exist_ok=True)
    process_file = note.with_suffix(".json")
    document = spec.exec_process(msgspec.json.decode(launch.files.config.read_bytes())["process"], request)
    process_file.write_bytes(msgspec.json.encode(document))
    return ExecCall(process_file, note, request.args, document["oomScoreAdj"], launch.owner)


def _signal_first(supervised: Supervised, signal: int) -> None:
    """By a pidfd that is checked to be of the same process: a pid alone may have been given to another."""
    with contextlib.suppress(ProcessLookupError):
        fd = pidfd.open_pidfd(supervised.pid)
        try:
            if process.process_start_time(supervised.pid) == supervised.started:
                pidfd.send_signal(fd, signal)
        finally:
            os.close(fd)
