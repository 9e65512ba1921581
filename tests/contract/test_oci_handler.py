"""The handlers of OCI runtimes, with real runc, crun and conmon, in the private namespaces of the run."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cri_shim.adapters import rootfs
from cri_shim.kernel import mounts, process
from cri_shim.model.ids import ContainerId, Digest
from cri_shim.model.image import ImageRecord, LayerRecord
from cri_shim.model.layout import Layout
from handlers import oci
from tests.contract.handler_suite import Bench, ExecSuite, HandlerSuite

pytestmark = pytest.mark.root

_APPLETS = ("sh", "sleep", "cat", "env", "id", "ls", "true", "mount", "grep", "dd", "usleep")


class Busybox:
    """Shell scripts in an image made of the host's static busybox."""

    outlives_daemon = True
    image: ImageRecord | None = None

    def __init__(self, layout: Layout) -> None:
        top = layout.layer(1)
        (top / "bin").mkdir(parents=True)
        for name in ("etc", "proc", "dev", "sys", "tmp"):
            (top / name).mkdir()
        shutil.copy("/bin/busybox", top / "bin/busybox")
        for applet in _APPLETS:
            (top / "bin" / applet).symlink_to("busybox")
        broken = top / "bin/broken"
        broken.write_bytes(b"this is no program\n")
        broken.chmod(0o644)

    def rootfs(self, layout: Layout, container_id: ContainerId) -> Path | None:
        key = Digest("sha256:" + "0" * 64)
        return rootfs.prepare(layout, container_id, [LayerRecord(key, key, 1, 0, 0)])

    def exits(self, code: int) -> tuple[str, ...]:
        return ("/bin/sh", "-c", f"exit {code}")

    def says(self, stdout: str, stderr: str) -> tuple[str, ...]:
        return ("sh", "-c", f"echo {stdout}; echo {stderr} >&2")

    def reveals(self, *words: str) -> tuple[str, ...]:
        script = 'for word in "$@"; do echo "arg $word"; done; env | while read -r line; do echo "env $line"; done'
        return ("sh", "-c", script, "sh", *words)

    def waits(self) -> tuple[str, ...]:
        return ("sh", "-c", "trap 'exit 143' TERM; echo ready; while :; do sleep 1000 & wait; done")

    def counts(self) -> tuple[str, ...]:
        return ("sh", "-c", "n=0; while :; do echo $n; n=$((n + 1)); usleep 20000; done")

    def is_broken(self) -> tuple[str, ...]:
        return ("/bin/broken",)


@pytest.fixture(params=["runc", "crun"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path, run_name: str) -> AsyncIterator[Bench]:
    process.set_child_subreaper()
    layout = Layout(root=tmp_path / "root", state=tmp_path / "state")
    layout.state.mkdir()
    options = oci.OPTIONS(path=request.param)
    bench = Bench(
        layout,
        Busybox(layout),
        lambda context: oci.make(request.param, options, context),
        f"/cri-shim-test-{run_name}/{tmp_path.name}",
    )
    reaper = process.Reaper()
    reaper.start(asyncio.get_running_loop())
    yield bench
    await bench.aclose()
    for plan in bench.plans:
        rootfs.remove(layout, plan.id)
    reaper.stop()
    mounts.unmount_tree(tmp_path)


class TestOciHandler(HandlerSuite):
    pass


class TestOciExec(ExecSuite):
    nested = ("sh", "-c", "sh -c 'sleep 1000 & sleep 1000' & sleep 1000")
