"""Pods as the documentation of Wasm on Kubernetes writes them: an image that holds app.wasm, `command: ["app.wasm"]`.

Under every handler and annotation that it names, each with a Linux sidecar that shares a volume and the network; and on
a node whose default is Wasm. The rules one by one: `tests/unit/test_dispatch.py`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config
from tests.support.daemon import PROGRAM
from tests.support.expect import eventually

pytestmark = pytest.mark.root

VARIANT = "module.wasm.image/variant"
LISTEN = "cri-shim.io/listen.app"
VOLUME = "/shared"


@dataclass(frozen=True, slots=True)
class Case:
    """A pod of the document, and the handlers that its containers get."""

    name: str
    handler: str
    annotations: Mapping[str, str]
    sidecar: str
    why: str


DETECTED = "the entrypoint is a Wasm file"
LEFT = f"{DETECTED}; handler 'crun' leaves Wasm to 'wasm'"
CASES = (
    Case("compat", "crun", {VARIANT: "compat"}, "crun", LEFT),
    Case("compat-smart", "crun", {VARIANT: "compat-smart"}, "crun", LEFT),
    Case("auto-detection", "crun", {}, "crun", LEFT),
    Case("runwasi", "wasm", {}, "runc", DETECTED),
)


@pytest.fixture
def app(registry: images.Registry) -> str:
    """`FROM scratch`, `COPY *.wasm /`: nothing but modules, and not a word about how to run them."""
    layer = images.layer(
        [
            images.file("app.wasm", guests.assemble(guests.GREETER)),
            images.file("read.wasm", guests.assemble(guests.prints_file(3, "note"))),
            images.file("write.wasm", guests.assemble(guests.writes_file(3, "made", "from wasm"))),
        ]
    )
    return registry.push("document/app-wasm:v1", images.image([layer]))


def volume(config: pb.ContainerConfig, directory: Path) -> pb.ContainerConfig:
    config.mounts.add(host_path=str(directory), container_path=VOLUME)
    return config


def decision(lab: Lab, container: str) -> str:
    """As `cri-shim explain` words it."""
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info = json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])
    return f"handler {info['handler']}: {info['handlerReason']}"


def explained(lab: Lab, image: str, handler: str, annotations: Mapping[str, str], *command: str) -> str:
    argv = [str(PROGRAM), "explain", "--listen", str(lab.daemon.socket), f"--runtime-handler={handler}"]
    argv += [f"--annotation={key}={value}" for key, value in annotations.items()]
    done = subprocess.run([*argv, image, "--", *command], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[-1].removeprefix("container").strip()


def shell(lab: Lab, container: str, script: str) -> str:
    return lab.cri.exec(container, ["sh", "-c", script]).stdout.decode()


def mixed_pod(lab: Lab, image: str, handler: str, annotations: Mapping[str, str], directory: Path) -> tuple[Pod, str]:
    """The pod with its server and a sidecar, and the sidecar's id; what they share works in both directions."""
    config = lab.pod_config(network=pb.POD)
    config.annotations.update({**annotations, LISTEN: "80"})
    pod = lab.pod(handler, config=config)
    sidecar = lab.cri.run(pod, volume(lab.shell("exec sleep 1000", name="sidecar"), directory))
    server = lab.cri.run(pod, container_config(image, "app.wasm", name="app"))
    lab.cri.wait_log(server, "listening")
    assert shell(lab, sidecar, "nc 127.0.0.1 80") == "hello from wasm\n"
    assert shell(lab, sidecar, f"echo from linux >{VOLUME}/note") == ""
    reader = volume(container_config(image, "read.wasm", name="reader"), directory)
    assert lab.output(pod, reader) == (0, ["from linux"])
    writer = volume(container_config(image, "write.wasm", name="writer"), directory)
    assert lab.output(pod, writer) == (0, [])
    assert shell(lab, sidecar, f"cat {VOLUME}/made") == "from wasm"
    return pod, sidecar


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pod_as_it_is_written(shared_lab: Lab, app: str, tmp_path: Path, case: Case) -> None:
    lab = shared_lab
    lab.cri.pull(app)
    pod, sidecar = mixed_pod(lab, app, case.handler, case.annotations, tmp_path)
    decisions = {c.metadata.name: decision(lab, c.id) for c in lab.cri.containers()}
    assert {decisions.pop(name) for name in ("app", "reader", "writer")} == {f"handler wasm: {case.why}"}
    assert decisions["sidecar"].startswith(f"handler {case.sidecar}: the entrypoint is an ELF binary")
    assert explained(lab, app, case.handler, case.annotations, "app.wasm") == f"handler wasm: {case.why}"
    said = explained(lab, lab.busybox, case.handler, case.annotations, "sleep", "1000")
    assert said == decisions["sidecar"]
    lab.cri.stop_pod(pod)
    assert lab.cri.status(sidecar).exit_code == 137


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_the_documents_limits(lab: Lab, registry: images.Registry, isolation: str) -> None:
    """10Mi and 50m, held against what the kernel counts: of the daemon and its threads, or of the worker's cgroup."""
    texts = {"spin": guests.SPIN, "hog": guests.TOUCHING_HOG}
    names = {name: registry.push_wasm(f"document/{name}:1", text) for name, text in texts.items()}
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    pod = lab.pod("wasm", config=config)
    for image in names.values():
        lab.cri.pull(image)
    daemon = Path(f"/proc/{lab.daemon.pid}")
    spin = lab.cri.run(pod, limited(container_config(names["spin"], name="spin")))
    before, begin = used_ns(lab, spin), time.monotonic_ns()
    time.sleep(2)
    # What it got too much, at its start or when nobody looked in time, it pays off.
    eventually(lambda: 0 < used_ns(lab, spin) - before < 0.08 * (time.monotonic_ns() - begin))
    if isolation == "in-process":
        assert thread_of(daemon, spin) is not None
    lab.cri.stop(spin)

    (daemon / "clear_refs").write_text("5")  # proc(5): the peak counts from now
    resident = memory(daemon, "VmRSS")
    hog = lab.cri.run(pod, limited(container_config(names["hog"], name="hog")))
    status = lab.cri.wait_exit(hog)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert memory(daemon, "VmHWM") - resident < 16 << 20


def limited(config: pb.ContainerConfig) -> pb.ContainerConfig:
    resources = config.linux.resources
    resources.memory_limit_in_bytes, resources.cpu_period, resources.cpu_quota = 10 << 20, 100_000, 5_000
    return config


def thread_of(daemon: Path, container: str) -> Path | None:
    """Of a module in the daemon's process."""
    for task in (daemon / "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            if (task / "comm").read_text().strip() == f"wasm-{container[:10]}":
                return task
    return None


def used_ns(lab: Lab, container: str) -> int:
    """CPU time: of the thread in the daemon as the kernel has it, of a worker's cgroup as the stats do."""
    task = thread_of(Path(f"/proc/{lab.daemon.pid}"), container)
    if task is not None:
        return int((task / "schedstat").read_text().split()[0])
    stats = lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
    return int(stats.cpu.usage_core_nano_seconds.value)


def memory(process: Path, field: str) -> int:
    """Bytes, of a field of `status` in KiB."""
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) << 10


def test_a_node_whose_default_is_wasm(
    make_daemon: MakeDaemon, registry: images.Registry, busybox: str, app: str, tmp_path: Path
) -> None:
    daemon = make_daemon({"default_handler": "wasm"})
    with daemon.client() as cri:
        lab = Lab(daemon, cri, busybox, "")
        for image in (app, busybox):
            cri.pull(image)
        mixed_pod(lab, app, "", {}, tmp_path)
        decisions = {c.metadata.name: decision(lab, c.id) for c in cri.containers()}
        assert decisions["app"] == f"handler wasm: {DETECTED}"
        assert (
            decisions["sidecar"]
            == "handler runc: the entrypoint is an ELF binary; handler 'wasm' leaves Linux to 'runc'"
        )
        assert lab.output(lab.pod("runc"), lab.shell("echo linux")) == (0, ["linux"])
        assert explained(lab, app, "", {}, "app.wasm") == f"handler wasm: {DETECTED}"
