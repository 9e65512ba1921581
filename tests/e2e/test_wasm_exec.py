"""ExecSync into Wasm containers, as exec probes use it: another instance of the module, wherever the first one runs."""

from __future__ import annotations

import grpc
import pytest

from tests.e2e.conftest import Lab
from tests.support import wasm as guests
from tests.support.cri import container_config
from tests.support.expect import refused
from tests.support.images import Registry

pytestmark = pytest.mark.root


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_probe_runs_another_instance(lab: Lab, registry: Registry, isolation: str) -> None:
    reference = registry.push_wasm("exec/probed:1", guests.PROBED)
    lab.cri.pull(reference)
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    container = lab.cri.run(lab.pod("wasm", config=config), container_config(reference, "app.wasm"))
    lab.cri.wait_log(container, "going to sleep")
    assert lab.cri.exec(container, ["app.wasm#healthy"]).exit_code == 0
    assert lab.cri.exec(container, ["app.wasm#sick"]).exit_code == 134
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "did not end within 1 s"):
        lab.cri.exec(container, ["app.wasm"], 1)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "no program 'sh'"):
        lab.cri.exec(container, ["sh"])
    assert lab.cri.exec(container, ["ls", "/"]).exit_code == 0
    assert b"app.wasm" in lab.cri.exec(container, ["ps"]).stdout
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "did not end within 1 s"):
        lab.cri.exec(container, ["sleep", "10"], 1)
    assert [line.text for line in lab.cri.log(container)] == ["going to sleep"]
    assert lab.cri.status(container).state == 1
