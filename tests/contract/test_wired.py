"""What the daemon says about itself, and what PullImage makes of a handler's name: the calls that need no container."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import cri_shim
from cri_shim.compose import Flows
from cri_shim.model.errors import NotFound
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver
from tests.support import images
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.wired import wired

LINUX = images.image([images.layer([images.file("a")])])
WASM = images.wasm_artifact(b"\0asm\x01\0\0\0")


@pytest.fixture
async def flows(tmp_path: Path) -> AsyncIterator[Flows]:
    async with wired(tmp_path) as made:
        await made.handlers.probe()
        yield made


async def test_version(flows: Flows) -> None:
    answer = await flows.runtime["Version"](pb.VersionRequest(version="0.1.0"))
    assert answer == pb.VersionResponse(
        version="0.1.0", runtime_name="cri-shim", runtime_version=cri_shim.VERSION, runtime_api_version="v1"
    )


async def test_status(flows: Flows) -> None:
    answer = await flows.runtime["Status"](pb.StatusRequest())
    assert isinstance(answer, pb.StatusResponse)
    runtime, network = answer.status.conditions
    assert (runtime.type, runtime.status, runtime.reason) == ("RuntimeReady", True, "NoLinuxRuntime")
    assert (network.type, network.status, network.reason) == ("NetworkReady", False, "NetworkPluginNotReady")
    assert network.message
    features = pb.RuntimeHandlerFeatures(recursive_read_only_mounts=True)
    assert list(answer.runtime_handlers) == [
        pb.RuntimeHandler(name="", features=features),
        pb.RuntimeHandler(name="wasm", features=features),
    ]
    assert answer.features == pb.RuntimeFeatures(supplemental_groups_policy=True, mount_options=True)
    assert not answer.info


async def test_verbose_status_is_json(flows: Flows) -> None:
    answer = await flows.runtime["Status"](pb.StatusRequest(verbose=True))
    assert isinstance(answer, pb.StatusResponse)
    assert json.loads(answer.info["config"])["images"]["max_parallel_downloads"] == 3
    assert json.loads(answer.info["node"])["hostname"] == "node"


@pytest.mark.parametrize(("driver", "told"), [(Driver.CGROUPFS, pb.CGROUPFS), (Driver.SYSTEMD, pb.SYSTEMD)])
async def test_the_cgroup_driver_is_always_told(
    tmp_path: Path, driver: Driver, told: pb.CgroupDriver.ValueType
) -> None:
    async with wired(tmp_path, driver=driver) as flows:
        answer = await flows.runtime["RuntimeConfig"](pb.RuntimeConfigRequest())
    assert isinstance(answer, pb.RuntimeConfigResponse)
    assert answer.HasField("linux")
    assert answer.linux.cgroup_driver == told


async def test_a_pod_cidr_is_accepted(flows: Flows) -> None:
    network = pb.NetworkConfig(pod_cidr="10.1.0.0/16,fd00::/64")
    request = pb.UpdateRuntimeConfigRequest(runtime_config=pb.RuntimeConfig(network_config=network))
    assert await flows.runtime["UpdateRuntimeConfig"](request) == pb.UpdateRuntimeConfigResponse()


async def test_the_platform_follows_the_handler_that_a_pull_names(flows: Flows) -> None:
    both = images.index({f"linux/{images.ARCHITECTURE}": LINUX, "wasi/wasm": WASM})
    with LoopbackRegistry() as registry:
        spec = pb.ImageSpec(image=registry.add("demo/both:1", both), runtime_handler="wasm")
        answer = await flows.image["PullImage"](pb.PullImageRequest(image=spec))
        assert answer == pb.PullImageResponse(image_ref=WASM.id)
        spec.runtime_handler = "no-such"
        with pytest.raises(NotFound, match=r"'no-such'.*there are: wasm"):
            await flows.image["PullImage"](pb.PullImageRequest(image=spec))
