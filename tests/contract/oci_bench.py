"""A bench for the handlers of OCI runtimes, with shell scripts as its guests."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cri_shim.adapters import rootfs
from cri_shim.kernel import mounts, process
from cri_shim.model.ids import ContainerId, Digest
from cri_shim.model.image import ImageRecord, LayerRecord
from cri_shim.model.layout import Layout
from handlers import oci
from tests.contract.handler_suite import Bench
from tests.support.leftovers import CGROUP_PREFIX

_APPLETS = (
    "sh",
    "sleep",
    "cat",
    "env",
    "id",
    "ls",
    "true",
    "mount",
    "grep",
    "dd",
    "usleep",
    "unshare",
    "touch",
    "df",
    "stty",
    "tty",
    "head",
)


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
        for name, mode in (("broken", 0o644), ("garbage", 0o755)):
            (top / "bin" / name).write_bytes(b"this is no program\n")
            (top / "bin" / name).chmod(mode)

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


@asynccontextmanager
async def oci_bench(runtime: str, directory: Path, run_name: str) -> AsyncIterator[Bench]:
    """A bench with this runtime, whose containers and mounts go at the end."""
    process.set_child_subreaper()
    layout = Layout(root=directory / "root", state=directory / "state")
    layout.state.mkdir()
    options = oci.OPTIONS(path=runtime)
    bench = Bench(
        layout,
        Busybox(layout),
        lambda context: oci.make(runtime, options, context),
        f"/{CGROUP_PREFIX}{run_name}/{directory.name}",
    )
    reaper = process.Reaper()
    reaper.start(asyncio.get_running_loop())
    yield bench
    await bench.aclose()
    for plan in bench.plans:
        rootfs.remove(layout, plan.id)
    reaper.stop()
    process.set_child_subreaper(enabled=False)
    mounts.unmount_tree(directory)
