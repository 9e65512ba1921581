"""`wasm: native`: crun runs a module of an image in its own engine (WasmEdge), as a process under conmon."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab, lab_on
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import container_config
from tests.support.daemon import Daemon
from tests.support.expect import refused

pytestmark = [pytest.mark.root, pytest.mark.vm]

HANDLERS = {
    "crun": {"kind": "oci", "path": "crun", "wasm": "native"},
    "runc": {"kind": "oci", "path": "runc", "wasm": "native"},
    "wasm": {"kind": "wasmtime"},
}
MIB = 1 << 20


@pytest.fixture(scope="module")
def native_daemon(make_shared_daemon: MakeDaemon) -> Daemon:
    return make_shared_daemon({"cgroup_driver": "systemd", "handlers": HANDLERS})


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


def test_a_module_prints_and_ends(lab: Lab, registry: images.Registry) -> None:
    """Not with what exit code: crun 1.21 ends with 0 whatever the module says."""
    code, lines = lab.output(lab.pod("crun"), container_config(module_image(lab, registry, "hello", guests.HELLO)))
    assert code == 0
    assert lines == ["hello from wasm"]


def test_it_is_a_process_with_limits_beside_linux_containers(lab: Lab, registry: images.Registry) -> None:
    pod = lab.pod("crun")
    config = container_config(module_image(lab, registry, "spins", guests.SPIN), name="spins")
    config.linux.resources.memory_limit_in_bytes = 128 * MIB
    module = lab.cri.run(pod, config)
    sidecar = lab.cri.run(pod, lab.shell("exec sleep 1000", name="sidecar"))
    assert lab.cri.exec(sidecar, ["true"], within=30).exit_code == 0
    stats = lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=module)).stats
    # A process in a cgroup: what the executor in the daemon has no figure for.
    assert stats.memory.page_faults.value > 0
    assert stats.memory.available_bytes.value == 128 * MIB - stats.memory.working_set_bytes.value
    lab.cri.stop(module)
    status = lab.cri.wait_exit(module)
    assert (status.exit_code, status.reason) == (137, "Error")


def test_what_it_cannot_run_is_refused_by_name(lab: Lab, registry: images.Registry) -> None:
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "built without a Wasm engine"):
        lab.cri.create(lab.pod("runc"), container_config(module_image(lab, registry, "hello", guests.HELLO)))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is a Wasm artifact, which has no files"):
        lab.cri.create(lab.pod("crun"), container_config(lab.wasm))
