"""One OCI runtime's command line: runc, crun, youki and whatever else follows the OCI runtime CLI.

Not for `create`, which conmon calls (`cri_shim.adapters.monitor`); this module says how. Invariant: a failed call
raises what the runtime wrote into its JSON log as the last error.

crun refuses to run where both cgroup versions are mounted. On such hosts its calls run in a mount namespace without the
v2 hierarchy, which is pinned once. Where `/` is private, later mounts (root file systems, volumes) do not reach the
pinned namespace, so that each `create` gets a fresh one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.adapters.cgroups import CgroupHost, Version
from cri_shim.adapters.runtime_probe import has_recursive_read_only
from cri_shim.kernel import mounts, namespaces, pipes, process, threads
from cri_shim.model.errors import CriShimError, DeadlineExceeded, Internal
from cri_shim.model.ids import ContainerId
from cri_shim.wire import oci_state
from cri_shim.wire.oci_update import update_error

_CALL_SECONDS: Final = 60.0
_PROBE_SECONDS: Final = 10.0
_PROBE: Final = ".probe"
"""In the runtime's state directory, where no container can have this name."""

Enter = Callable[[], None]
"""Runs in the throw-away thread that starts a process; see `kernel.process.spawn`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a binary says about itself, asked once."""

    version: oci_state.Version
    features: oci_state.RuntimeFeatures


@dataclass(frozen=True, slots=True)
class Streams:
    """Descriptors for an exec'ed process; without a stdin it reads end-of-file at once."""

    stdin: int | None
    stdout: int
    stderr: int


@dataclass(frozen=True, slots=True)
class ExecCall:
    """A further process: its document (OCI runtime-spec, `process`), and where the runtime writes its pid."""

    document: Path
    pid_file: Path
    args: tuple[str, ...]
    """For the hint of an error."""
    oom_score_adj: int
    """As in the document: crun does not read it there, its process gets what the caller has."""
    owner: tuple[int, int] | None = None
    """Whom its pipes are given to, uid and gid; None = the runtime sees to it."""
    console: Path | None = None
    """The socket that the runtime sends the terminal to."""


class OciRuntime:
    """The calls of one binary with one state directory."""

    def __init__(self, program: str, root: Path, host: CgroupHost, *, pin: Path, systemd_cgroup: bool) -> None:
        """`root` is the runtime's own state, `pin` where a mount namespace may be kept."""
        self.program = shutil.which(program) or program
        self.root = root
        self.systemd_cgroup = systemd_cgroup
        self._host = host
        self._pin = pin
        self._asking: asyncio.Task[Identity] | None = None
        self._pinning: asyncio.Task[None] | None = None

    def global_arguments(self, log: Path) -> list[str]:
        """The flags before the verb."""
        flags = [f"--root={self.root}", f"--log={log}", "--log-format=json"]
        return [*flags, "--systemd-cgroup"] if self.systemd_cgroup else flags

    async def identity(self) -> Identity:
        """Version and features, asked once; of a binary without `features` (crun before 1.9) they are found out."""
        if self._asking is None or (self._asking.done() and self._asking.exception() is not None):
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)

    async def aclose(self) -> None:
        """Wait for what asks the binary: half a probe would stay on the node."""
        if self._asking is not None:
            await asyncio.wait((self._asking,))

    async def create_enter(self) -> Enter | None:
        """Where conmon and the runtime's `create` have to start; None = here."""
        if not self._is_confined((await self.identity()).version):
            return None
        if await asyncio.to_thread(mounts.propagation_of, Path("/")):
            return await self._pinned()
        return namespaces.fresh_mount_namespace_without(self._hidden())

    async def start(self, container_id: ContainerId, log: Path, command: Sequence[str]) -> None:
        """Let the created container run; returns after its program was executed. `command` is for the error's hint."""
        done = await self._call(log, "start", container_id)
        if done.returncode != 0:
            raise await self._error("cannot start the container", done, log, command)

    async def is_running(self, container_id: ContainerId, log: Path) -> bool:
        """Whether the container was started and has not ended; False for one that the runtime does not know."""
        done = await self._call(log, "state", container_id)
        return done.returncode == 0 and oci_state.parse_state(done.stdout) == "running"

    async def update(self, container_id: ContainerId, resources: Mapping[str, object], log: Path) -> None:
        """Change limits: `resources` as `linux.resources` of the OCI runtime-spec; what is absent stays."""
        done = await self._call(log, "update", "--resources=-", container_id, stdin=msgspec.json.encode(resources))
        if done.returncode != 0:
            raise update_error(oci_state.last_error(await asyncio.to_thread(_read_if_there, log)) or done.text())

    async def delete(self, container_id: ContainerId, log: Path) -> None:
        """Kill what runs, remove the runtime's state and the container's cgroup. Unknown = success."""
        if not await asyncio.to_thread((self.root / container_id).exists):
            return
        if not await asyncio.to_thread(log.parent.exists):
            log = Path(os.devnull)  # the bundle is gone already
        done = await self._call(log, "delete", "--force", container_id)
        if done.returncode != 0 and await asyncio.to_thread((self.root / container_id).exists):
            raise await self._error("cannot delete the container", done, log)

    async def exec(self, container_id: ContainerId, call: ExecCall, streams: Streams | None) -> process.Child:
        """Start a further process; returns when it runs. The daemon, a subreaper, is its parent then.

        Without streams it has a terminal, which is in the call's console socket when this returns.
        """
        log = call.pid_file.with_suffix(".log")
        argv = [self.program, *self.global_arguments(log), "exec", "--detach"]
        argv += [f"--process={call.document}", f"--pid-file={call.pid_file}"]
        argv += [f"--console-socket={call.console}"] if call.console else []
        argv.append(container_id)
        enter = await self._enter()

        def spawn() -> process.Child:
            if enter is not None:
                enter()
            if streams is None:
                caller = process.spawn(argv)
            else:
                with _no_input() if streams.stdin is None else contextlib.nullcontext(streams.stdin) as stdin:
                    if call.owner is not None:
                        pipes.give((stdin, streams.stdout, streams.stderr), call.owner)
                    caller = process.spawn(argv, stdin=stdin, stdout=streams.stdout, stderr=streams.stderr)
            process.set_oom_score_adj(caller.pid, call.oom_score_adj)
            return caller

        with process.Reaper().hold():
            caller = await threads.await_in_new_thread(spawn)
            returncode = await _ended(caller, argv)
            if returncode == 0:
                child = process.adopt(int(call.pid_file.read_bytes()))
                # runc gives what the container was created with, though it may have been updated since.
                process.set_oom_score_adj(child.pid, call.oom_score_adj)
                return child
        failed = process.Completed(tuple(argv), returncode, b"", b"")
        raise await self._error("cannot exec in the container", failed, log, call.args)

    async def create_error(self, said: str, log: Path, command: Sequence[str]) -> CriShimError:
        """The error for a failed `create`, of which conmon has `said` something."""
        written = await asyncio.to_thread(_read_if_there, log)
        return oci_state.runtime_error("cannot create the container", oci_state.last_error(written) or said, command)

    async def _error(self, what: str, done: process.Completed, log: Path, command: Sequence[str] = ()) -> CriShimError:
        written = await asyncio.to_thread(_read_if_there, log)
        return oci_state.runtime_error(what, oci_state.last_error(written) or done.text(), command)

    async def _call(self, log: Path, *arguments: str, stdin: bytes = b"") -> process.Completed:
        argv = [self.program, *self.global_arguments(log), *arguments]
        return await process.run(argv, stdin=stdin, timeout=_CALL_SECONDS, enter=await self._enter())

    async def _ask(self) -> Identity:
        said, features = await asyncio.gather(
            process.run([self.program, "--version"], timeout=_PROBE_SECONDS),
            process.run([self.program, "features"], timeout=_PROBE_SECONDS),
        )
        if said.returncode != 0:
            msg = f"{self.program} --version failed: {said.text()}"
            raise Internal(msg)
        version = oci_state.parse_version(said.stdout.decode(errors="replace"))
        if features.returncode == 0:
            return Identity(version, oci_state.parse_features(features.stdout))
        enter = namespaces.fresh_mount_namespace_without(self._hidden()) if self._is_confined(version) else None
        runtime = [self.program, *self.global_arguments(Path(os.devnull))]
        able = await has_recursive_read_only(runtime, self.root / _PROBE, version.spec, enter)
        return Identity(version, oci_state.RuntimeFeatures(recursive_read_only=able, user_namespaces=False))

    async def _enter(self) -> Enter | None:
        return await self._pinned() if self._is_confined((await self.identity()).version) else None

    def _is_confined(self, version: oci_state.Version) -> bool:
        return self._host.version is Version.HYBRID and version.name == "crun"

    async def _pinned(self) -> Enter:
        if self._pinning is None or (self._pinning.done() and self._pinning.exception() is not None):
            pin = asyncio.to_thread(namespaces.pin_mount_namespace, self._pin, self._hidden())
            self._pinning = asyncio.ensure_future(pin)
        await asyncio.shield(self._pinning)
        return namespaces.enter_mount_namespace(self._pin)

    def _hidden(self) -> tuple[Path, ...]:
        return (self._host.unified,) if self._host.unified is not None else ()


@contextlib.contextmanager
def _no_input() -> Iterator[int]:
    """A pipe that nobody writes to. Not /dev/null: crun gives what is behind a stream to the container's user."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    os.close(write_end)
    try:
        yield read_end
    finally:
        os.close(read_end)


async def _ended(caller: process.Child, argv: Sequence[str]) -> int:
    """The return code of a short-lived call that has its own streams; killed when it takes too long."""
    try:
        async with asyncio.timeout(_CALL_SECONDS):
            return await caller.watched().wait()
    except TimeoutError:
        msg = f"{argv[0]} exec did not finish within {_CALL_SECONDS:g} s and was killed"
        raise DeadlineExceeded(msg) from None
    finally:
        caller.kill()


def _read_if_there(path: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return b""
