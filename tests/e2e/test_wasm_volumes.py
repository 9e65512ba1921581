"""The VOLUMEs that an image of a module declares: as of a Linux container, wherever the module runs."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import container_config

pytestmark = [pytest.mark.root, pytest.mark.parametrize("isolation", ["in-process", "process"])]


def test_an_image_that_declares_volumes(lab: Lab, registry: images.Registry, isolation: str) -> None:
    layer = images.layer(
        [
            images.directory("data", 0o750, uid=7, gid=8),
            images.file("data/one", b"of the image\n", 0o640),
            images.file("sleep.wasm", guests.assemble(guests.SLEEP)),
        ]
    )
    made = images.image([layer], {"Volumes": {"/data": {}, "/fresh": {}}, "Entrypoint": ["/sleep.wasm"]})
    reference = registry.push("volumes/module:1", made)
    lab.cri.pull(reference)
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    pod = lab.pod("wasm", config=config)
    wanted = container_config(reference)
    wanted.linux.security_context.readonly_rootfs = True
    container = lab.cri.run(pod, wanted)
    said = lab.cri.exec(container, ["stat", "-c", "%n %a %u %g %F", "/data", "/data/one", "/fresh"]).stdout.decode()
    preopens = lab.cri.exec(container, ["stat"]).stdout.decode()
    assert said.splitlines() == [
        "/data 750 7 8 directory",
        "/data/one 640 0 0 regular file",
        "/fresh 755 0 0 directory",
    ]
    assert {"     Preopen: /data, read-write", "     Preopen: /fresh, read-write", "     Preopen: /, read-only"} <= set(
        preopens.splitlines()
    )


def test_an_artifact_that_declares_one(lab: Lab, registry: images.Registry, isolation: str) -> None:
    # The volume is the first directory that it is given.
    made = images.wasm_image(guests.assemble(guests.writes_file(3, "new", "written")), {"Volumes": {"/data/": {}}})
    reference = registry.push("volumes/artifact:1", made)
    lab.cri.pull(reference)
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    pod = lab.pod("wasm", config=config)
    container = lab.cri.run(pod, container_config(reference))
    assert lab.cri.wait_exit(container).exit_code == 0
    directory = lab.daemon.root / "containers" / container
    assert [file.read_text() for file in directory.rglob("new")] == ["written"]
    lab.cri.remove(container)
    assert not directory.exists()
