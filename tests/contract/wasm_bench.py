"""A bench for the wasmtime handler: containers of artifacts that are assembled on the spot.

Not the suite that all handlers share (`tests.contract.handler_suite`), which it serves too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cri_shim.adapters.context import HandlerContext
from cri_shim.model.capabilities import NAMES
from cri_shim.model.container import Exit, User
from cri_shim.model.handler import ContainerPlan, Handler, ProcessPlan
from cri_shim.model.ids import ContainerId, Digest, ImageId
from cri_shim.model.image import ImageConfig, ImageRecord, Platform, WasmModule
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime import kind
from handlers.wasmtime.placement import Isolation
from tests.contract.handler_suite import PATIENCE, Bench
from tests.support import wasm
from tests.support.cri import read_log

ALL_CAPABILITIES = frozenset(NAMES)


class Programs:
    """The suite's programs, as modules in a root file system: a plain directory is enough."""

    image: ImageRecord | None = None
    in_rootfs = True

    def __init__(self, *, outlives_daemon: bool) -> None:
        self.outlives_daemon = outlives_daemon

    def rootfs(self, layout: Layout, container_id: ContainerId) -> Path | None:
        if not self.in_rootfs:
            return None
        root = layout.rootfs(container_id)
        (root / "bin").mkdir(parents=True)
        for name, text in wasm.PROGRAMS.items():
            (root / "bin" / name).write_bytes(wasm.assemble(text))
        (root / "bin" / "broken").write_bytes(b"this is no module\n")
        return root

    def exits(self, code: int) -> tuple[str, ...]:
        return ("exit", str(code))

    def says(self, stdout: str, stderr: str) -> tuple[str, ...]:
        return ("say", stdout, stderr)

    def reveals(self, *words: str) -> tuple[str, ...]:
        return ("reveal", *words)

    def waits(self) -> tuple[str, ...]:
        return ("wait",)

    def counts(self) -> tuple[str, ...]:
        return ("count",)

    def is_broken(self) -> tuple[str, ...]:
        return ("/bin/broken",)


class WasmBench(Bench):
    """`artifact` makes the plan of a container whose image is one module."""

    def __init__(
        self,
        layout: Layout,
        make: Callable[[HandlerContext], Handler],
        *,
        cgroup_parent: str = "",
        outlives_daemon: bool = False,
    ) -> None:
        self.programs = Programs(outlives_daemon=outlives_daemon)
        super().__init__(layout, self.programs, make, cgroup_parent=cgroup_parent)

    def artifact(self, module: str | bytes, *args: str, env: Sequence[str] = (), **config: Any) -> ContainerPlan:
        """`module` as Wasm text or as bytes, put where a pull puts it; `config` are fields of `ContainerConfig`."""
        code = wasm.assemble(module) if isinstance(module, str) else module
        digest = Digest(f"sha256:{hashlib.sha256(code).hexdigest()}")
        blob = self.layout.blob(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(code)
        self.programs.in_rootfs = False
        plan = dataclasses.replace(
            self.plan(()),
            config=pb.ContainerConfig(**config),
            process=ProcessPlan(args=args or ("module.wasm",), env=tuple(env), cwd="/", user=User()),
            image=_image(digest, len(code)),
        )
        self.programs.in_rootfs = True
        self.plans[-1] = plan
        return plan

    async def begin(self, plan: ContainerPlan) -> ContainerPlan:
        """Create and start."""
        await self.create_and_start(plan)
        return plan

    async def finish(self, plan: ContainerPlan) -> Exit:
        """Create, start, and wait for the end."""
        return await self.end_of(await self.begin(plan))

    def entries(self, plan: ContainerPlan) -> list[tuple[str, str, str]]:
        """Stream, tag and text of each entry of the log."""
        assert plan.log_path is not None
        return [(line.stream, "P" if line.partial else "F", line.text) for line in read_log(plan.log_path)]

    def text(self, plan: ContainerPlan) -> list[str]:
        """The text of each entry."""
        return [text for _, _, text in self.entries(plan)]

    async def said(self, plan: ContainerPlan, text: str) -> None:
        """Wait until the log has this text."""
        assert plan.log_path is not None
        async with asyncio.timeout(PATIENCE):
            while text.encode() not in plan.log_path.read_bytes():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def wasm_bench(
    root: Path, state: Path, *, capabilities: frozenset[str] = frozenset()
) -> AsyncIterator[WasmBench]:
    """A bench whose daemon has these capabilities: without any it mounts nothing, also as root."""

    def make(context: HandlerContext) -> Handler:
        return kind.make("wasm", kind.OPTIONS(), dataclasses.replace(context, capabilities=capabilities))

    state.mkdir(exist_ok=True)
    bench = WasmBench(Layout(root, state), make)
    try:
        yield bench
    finally:
        await bench.aclose()


@asynccontextmanager
async def worker_bench(
    root: Path, state: Path, cgroup_parent: str, *, isolation: str = "process"
) -> AsyncIterator[WasmBench]:
    """A bench with the daemon's own rights, whose containers all run in processes of their own, or not; for root."""

    def make(context: HandlerContext) -> Handler:
        return kind.make("wasm", kind.OPTIONS(isolation=Isolation(isolation)), context)

    state.mkdir(exist_ok=True)
    bench = WasmBench(Layout(root, state), make, cgroup_parent=cgroup_parent, outlives_daemon=isolation == "process")
    try:
        yield bench
    finally:
        await bench.aclose()


def _image(digest: Digest, size: int) -> ImageRecord:
    return ImageRecord(
        id=ImageId(digest),
        manifest=digest,
        index=None,
        config_digest=digest,
        size=size,
        platform=Platform("wasi", "wasm"),
        config=ImageConfig(),
        pulled_at=1,
        wasm=WasmModule(digest, "application/wasm", size),
    )


def limited(memory: int) -> pb.LinuxContainerConfig:
    """A memory limit in bytes."""
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=memory))


def secured(**fields: Any) -> pb.LinuxContainerConfig:
    """A security context."""
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))


def mount(source: Path, target: str, *, readonly: bool = False) -> pb.Mount:
    """A mount of a path of the host."""
    return pb.Mount(host_path=str(source), container_path=target, readonly=readonly)


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))
