"""The tour that `scripts/demo` gives: three pods on a private daemon, driven over its CRI socket, shown line by line.

Not a test: it asserts nothing but that each step works. Invariant: whatever ends the tour, Ctrl-C too, nothing of it
stays on the machine, except with `--keep`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc
import msgspec

from cri_shim.pb import api_pb2 as pb
from tests.support import images, leftovers
from tests.support.cri import Cri, LogLine, Pod, container_config, fault
from tests.support.daemon import Daemon, DaemonError

T = TypeVar("T")

NEEDED = ("runc", "crun", "conmon", "iptables")
"""Programs without which no Linux pod runs here."""
PLUGINS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
KEPT = "kept.json"
"""In the directory of a tour that was left up: what to end."""


class DemoError(Exception):
    """The tour cannot go on; the message is for the user."""


class Kept(msgspec.Struct, frozen=True):
    """A tour that was left up. A process is its pid and its start time, so that nobody else's is ended."""

    daemon: tuple[int, int]
    registry: tuple[int, int]
    cgroup_parent: str


@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of the tour: a pod with one container."""

    handler: str
    image: str
    command: tuple[str, ...]
    expect: str
    """In the log line that shows that it works."""
    ends: bool = False
    """Whether the container ends by itself."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds that the client waited for each call."""

    run: float
    create: float
    start: float

    @property
    def total(self) -> float:
        return self.run + self.create + self.start

    def words(self) -> str:
        return f"{self.total:.0f} ms = pod {self.run:.0f} + create {self.create:.0f} + start {self.start:.0f}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a stop showed."""

    pod: str
    handler: str
    container: str
    state: str
    first: Latency
    second: Latency
    """Of a second pod like it: the first one may have had something to load."""


def main(argv: Sequence[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        match list(argv):
            case ["--stop"]:
                stop_kept(kept_directory())
            case ["--keep"]:
                tour(kept_directory(), keep=True)
            case _:
                tour(Path(tempfile.mkdtemp(prefix="cs.", dir="/tmp")), keep=False)
    except KeyboardInterrupt:
        print("demo: interrupted; everything is removed", file=sys.stderr)
        return 130
    except (DemoError, DaemonError, images.ImageError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        code, words = fault(error)
        print(f"demo: the daemon refused a call: {code.name}: {words}", file=sys.stderr)
        return 1
    return 0


def tour(base: Path, *, keep: bool) -> None:
    if (base / KEPT).exists():
        raise DemoError(f"a demo is up in {base}; end it first: scripts/demo --stop")
    missing = missing_for_linux()
    print("cri-shim demo\n")
    with ExitStack() as clean_up:
        clean_up.callback(remove_directory, base)
        daemon = Daemon(base, settings=settings(missing), cgroup_parent=f"/{base.name}" if not missing else "")
        registry = clean_up.enter_context(images.registry(base / "registry"))
        say("registry", f"{registry.address} ({registry.kind})")
        clean_up.callback(end_daemon, daemon)
        say("daemon", f"serves after {daemon.start():.2f} s on {daemon.socket}")
        if missing:
            say("Linux pods", f"left out: {missing}")
        with daemon.client() as cri:
            seen = [visit(daemon, cri, stop) for stop in stops(registry, linux=not missing)]
            show_summary(seen)
            if keep:
                keep_up(daemon, registry.pid, seen)
                clean_up.pop_all()
                return
            for pod in seen:
                cri.stop_pod(pod.pod)
                cri.remove_pod(pod.pod)
        print("\npods removed; ending the daemon and the registry")
    print("done; nothing is left")


def missing_for_linux() -> str:
    """Why Linux containers cannot run here; empty if they can."""
    if os.geteuid() != 0:
        return "they need root (mounts, namespaces, cgroups)"
    if "CRI_SHIM_PRIVATE_NS" not in os.environ:
        return "no private namespaces here"
    programs = [name for name in NEEDED if shutil.which(name) is None]
    if not any((directory / "bridge").exists() for directory in PLUGINS):
        programs.append("CNI plugins")
    return f"not installed: {', '.join(programs)}" if programs else ""


def settings(missing: str) -> dict[str, object]:
    if missing:
        return {"handlers": {"wasm": {"kind": "wasmtime"}}, "default_handler": "wasm", "log": {"level": "info"}}
    return {"default_handler": "runc", "log": {"level": "info"}}


def stops(registry: images.Registry, *, linux: bool) -> list[Stop]:
    """Builds the images, pushes them and says what to run."""
    result = []
    if linux:
        busybox = registry.push_busybox("demo/busybox:1")
        script = 'echo "hello from $(busybox hostname): $(uname -sr), pid $$"; exec sleep 3600'
        result += [Stop(name, busybox, ("sh", "-c", script), "hello from") for name in ("runc", "crun")]
    return [*result, Stop("wasm", registry.push_wasm("demo/hello:1"), (), "hello", ends=True)]


def visit(daemon: Daemon, cri: Cri, stop: Stop) -> Seen:
    """Pulls the image, runs the pod and shows what came out."""
    network = pb.NODE if stop.handler == "wasm" else pb.POD
    config = daemon.pod_config(f"demo-{stop.handler}", network=network)
    print(f"\npod {config.metadata.name}")
    _, pulled = timed(lambda: cri.pull(stop.image))
    say("image", f"{stop.image}, pulled in {pulled:.0f} ms")
    pod, container, first = launch(cri, config, stop)
    status = cri.pod_status(pod)
    address = status.network.ip or "host network"
    say("pod", f"{pb.PodSandboxState.Name(status.state).removeprefix('SANDBOX_')}, {status.runtime_handler}, {address}")
    say("start", first.words())
    lines = cri.wait_log(container, stop.expect)
    state = show_container(cri, container, lines, ends=stop.ends)
    again, _, second = launch(cri, daemon.pod_config(f"demo-{stop.handler}-2", network=network), stop)
    say("again", f"{second.words()}, for a second pod like it")
    cri.stop_pod(again)
    cri.remove_pod(again)
    return Seen(pod.id, stop.handler, container, state, first, second)


def launch(cri: Cri, config: pb.PodSandboxConfig, stop: Stop) -> tuple[Pod, str, Latency]:
    """Runs a pod with one container; its container's id and what each call took."""
    pod, run = timed(lambda: cri.run_pod(config, stop.handler))
    # The kubelet labels containers like this; `crictl ps` shows the pod by it.
    labels = {f"io.kubernetes.pod.{key}": getattr(config.metadata, key) for key in ("name", "namespace", "uid")}
    container, create = timed(lambda: cri.create(pod, container_config(stop.image, *stop.command, labels=labels)))
    _, start = timed(lambda: cri.start(container))
    return pod, container, Latency(run, create, start)


def show_container(cri: Cri, container: str, lines: Sequence[LogLine], *, ends: bool) -> str:
    """Prints state and log; returns the state."""
    status = cri.wait_exit(container) if ends else cri.status(container)
    state = pb.ContainerState.Name(status.state).removeprefix("CONTAINER_")
    if status.state == pb.CONTAINER_EXITED:
        state = f"{state} {status.exit_code}"
    say("container", f"{container[:13]} {state}")
    for line in lines:
        say("log" if line is lines[0] else "", f"| {line.text}")
    return state


def show_summary(seen: Sequence[Seen]) -> None:
    print(f"\n{'HANDLER':12}{'POD':16}{'CONTAINER':16}{'STATE':12}{'START':>10}{'AGAIN':>10}")
    for one in seen:
        latency = f"{one.first.total:7.0f} ms{one.second.total:7.0f} ms"
        print(f"{one.handler:12}{one.pod[:13]:16}{one.container[:13]:16}{one.state:12}{latency}")


def keep_up(daemon: Daemon, registry: int, seen: Sequence[Seen]) -> None:
    """Notes what to end later and prints what to try."""
    kept = Kept(
        daemon=(daemon.pid, leftovers.started(daemon.pid)),
        registry=(registry, leftovers.started(registry)),
        cgroup_parent=daemon.cgroup_parent,
    )
    (daemon.base / KEPT).write_bytes(msgspec.json.encode(kept))
    first, last = seen[0], seen[-1]
    lines = [
        f"export CONTAINER_RUNTIME_ENDPOINT=unix://{daemon.socket}",
        "crictl info",
        "crictl pods",
        "crictl ps -a",
        "crictl images",
        f"crictl logs {last.container[:13]}",
        f"crictl inspectp {first.pod[:13]}",
    ]
    if first is not last:
        lines.append(f"crictl exec -s {first.container[:13]} ps")
    print("\nThe daemon is up. Try:\n")
    print("\n".join(f"  {line}" for line in lines))
    if os.geteuid() == 0:
        print("\nIts bridge and mounts are in namespaces of their own; look at them from inside:\n")
        print(f"  nsenter --target {daemon.pid} --mount --net")
    print(f"\nThe log is {daemon.log}. To end and remove everything:\n\n  scripts/demo --stop")


def stop_kept(base: Path) -> None:
    if not (base / KEPT).exists():
        raise DemoError("nothing to stop: no demo was left up")
    kept = msgspec.json.decode((base / KEPT).read_bytes(), type=Kept)
    if is_alive(kept.daemon):
        with Cri(base / "cri.sock") as cri:
            cri.remove_all_pods()
    for process in (kept.daemon, kept.registry):
        end_process(process)
    leftovers.sweep(base, kept.cgroup_parent)
    remove_directory(base)
    print("demo: ended; nothing is left")


def kept_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/run/cri-shim-demo")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime, "cri-shim-demo") if runtime else Path(f"/tmp/cri-shim-demo-{os.getuid()}")


def end_daemon(daemon: Daemon) -> None:
    """Ends the daemon with all that it runs, also when the tour broke off."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not daemon.is_running:
        daemon.sweep()
        return
    try:
        daemon.close()
    except (DaemonError, grpc.RpcError) as error:
        print(f"demo: cleaned up by force: {error}", file=sys.stderr)


def end_process(process: tuple[int, int]) -> None:
    """SIGTERM, and SIGKILL after ten seconds."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + seconds
        while is_alive(process) and time.monotonic() < deadline:
            os.kill(process[0], number)
            time.sleep(0.1)


def is_alive(process: tuple[int, int]) -> bool:
    pid, started = process
    return started != 0 and leftovers.started(pid) == started


def remove_directory(base: Path) -> None:
    """Removes the tour's directory, unless something is still mounted below it."""
    mounted = [point for point in leftovers.mount_points() if Path(point).is_relative_to(base)]
    if mounted:
        raise DemoError(f"still mounted, so not removed: {', '.join(mounted)}")
    shutil.rmtree(base, ignore_errors=True)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The value and the milliseconds."""
    begin = time.perf_counter()
    value = call()
    return value, (time.perf_counter() - begin) * 1000


def say(what: str, words: str) -> None:
    print(f"  {what:11}{words}")


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
