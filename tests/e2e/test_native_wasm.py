"""`wasm: native`: crun runs a module of an image in its own engine (WasmEdge), as a process under conmon.

With a crun that has one. What crun gets wrong is held here too: where that fails, a newer one has mended it, and the
documents have a flaw less to tell.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab, lab_on
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config
from tests.support.daemon import Daemon
from tests.support.expect import refused
from tests.support.new_runtime import runtime_with_engine

pytestmark = pytest.mark.root

MIB = 1 << 20
GRACE = 3
ANNOTATIONS = [
    {},
    {"module.wasm.image/variant": "compat"},
    {"module.wasm.image/variant": "compat-smart"},
    {"run.oci.handler": "wasm"},
]


@pytest.fixture(scope="module")
def native_daemon(make_shared_daemon: MakeDaemon) -> Daemon:
    crun = runtime_with_engine()
    if crun is None:
        pytest.skip("no crun here has an engine: run scripts/fetch-crun .runtimes libwasmedge0")
    handlers = {
        "crun": {"kind": "oci", "path": crun, "wasm": "native"},
        "runc": {"kind": "oci", "path": "runc", "wasm": "native"},
        "wasm": {"kind": "wasmtime"},
    }
    return make_shared_daemon({"handlers": handlers})


@pytest.fixture
def lab(native_daemon: Daemon, busybox: str, registry: images.Registry) -> Iterator[Lab]:
    with native_daemon.client() as cri:
        yield lab_on(native_daemon, cri, busybox, registry)
        cri.remove_all_pods()


def module_image(lab: Lab, registry: images.Registry, name: str, text: str) -> str:
    """An ordinary image whose entrypoint is a module."""
    layer = images.layer([images.file("main.wasm", guests.assemble(text), 0o755)])
    reference = registry.push(f"test/native-{name}:1", images.image([layer], config={"Entrypoint": ["/main.wasm"]}))
    lab.cri.pull(reference)
    return reference


def annotated(lab: Lab, annotations: Mapping[str, str]) -> Pod:
    config = lab.pod_config()
    config.annotations.update(annotations)
    return lab.pod("crun", config=config)


@pytest.mark.parametrize("annotations", ANNOTATIONS, ids=str)
def test_modules_and_sidecars_with_the_annotations_that_people_know(
    lab: Lab, registry: images.Registry, annotations: dict[str, str]
) -> None:
    pod = annotated(lab, annotations)
    config = container_config(module_image(lab, registry, "hello", guests.HELLO), name="module")
    assert lab.output(pod, config) == (0, ["hello from wasm"])
    # crun itself would take each container of such a pod for a module.
    assert lab.say(pod, "echo linux", name="sidecar") == ["linux"]


def test_it_is_a_process_with_limits(lab: Lab, registry: images.Registry) -> None:
    pod = lab.pod("crun")
    config = container_config(module_image(lab, registry, "spins", guests.SPIN), name="spins")
    config.linux.resources.memory_limit_in_bytes = 128 * MIB
    module = lab.cri.run(pod, config)
    stats = lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=module)).stats
    # A process in a cgroup: what the executor in the daemon has no figure for.
    assert stats.memory.page_faults.value > 0
    assert stats.memory.available_bytes.value == 128 * MIB - stats.memory.working_set_bytes.value
    lab.cri.stop(module)
    status = lab.cri.wait_exit(module)
    assert (status.exit_code, status.reason) == (137, "Error")


def test_crun_loses_the_exit_code(lab: Lab, registry: images.Registry) -> None:
    image = module_image(lab, registry, "exit", guests.exits(7))
    assert lab.output(lab.pod("crun"), container_config(image)) == (0, [])


def test_sigterm_is_ignored_for_the_whole_grace_period(lab: Lab, registry: images.Registry) -> None:
    module = lab.cri.run(lab.pod("crun"), container_config(module_image(lab, registry, "sleep", guests.SLEEP)))
    lab.cri.wait_log(module, "going to sleep", within=60)
    began = time.monotonic()
    lab.cri.stop(module, GRACE)
    assert time.monotonic() - began >= GRACE
    assert lab.cri.status(module).exit_code == 137


def test_crun_refuses_exec(lab: Lab, registry: images.Registry) -> None:
    module = lab.cri.run(lab.pod("crun"), container_config(module_image(lab, registry, "sleep", guests.SLEEP)))
    lab.cri.wait_log(module, "going to sleep", within=60)
    answer = lab.cri.exec(module, ["/main.wasm"], within=60)
    assert (answer.exit_code, answer.stdout, b"does not support exec" in answer.stderr) == (1, b"", True), answer
    assert lab.cri.status(module).state == pb.CONTAINER_RUNNING


def test_what_it_cannot_run_is_refused_by_name(lab: Lab, registry: images.Registry) -> None:
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "built without a Wasm engine"):
        lab.cri.create(lab.pod("runc"), container_config(module_image(lab, registry, "hello", guests.HELLO)))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is a Wasm artifact, which has no files"):
        lab.cri.create(lab.pod("crun"), container_config(lab.wasm))
