"""All flows of a daemon, wired by the daemon's own composition root, without a process or a socket.

For tests of what the tables of RPCs hold and of the calls that need no container. The one handler is `wasm`, so that it
works without root and without any runtime. Invariant: nothing runs that was not called.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.adapters.zygote import Zygote
from cri_shim.compose import Base, Flows
from cri_shim.config import Config
from cri_shim.loader import handler_options
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.streaming.server import Server as StreamingServer
from cri_shim.streaming.server import Settings

CONFIG = Config(handlers={"wasm": {"kind": "wasmtime", "linux_containers": ""}})


@asynccontextmanager
async def wired(directory: Path, config: Config = CONFIG, driver: Driver = Driver.CGROUPFS) -> AsyncIterator[Flows]:
    """The flows of a daemon that lives below `directory`."""
    layout = Layout(root=directory / "root", state=directory / "state")
    for needed in (layout.root, layout.state, layout.images, layout.partials, layout.layers, layout.wasm_cache):
        needed.mkdir(parents=True, exist_ok=True)
    store = Store.open(layout.database)
    zygote = Zygote()
    base = Base(
        config=config,
        layout=layout,
        store=store,
        zygote=zygote,
        user_namespaces=UserNamespaces(layout, zygote),
        network=Network([directory / "no-cni"], [directory / "no-cni"]),
        node=NodeFacts(hostname="node", boot_id="boot", root=False),
        driver=driver,
        cgroups=Cgroups(Cgroups.detect(), driver),
        streaming=StreamingServer(Settings()),
    )
    flows = Flows.build(base, handler_options(config, {}))
    try:
        await flows.recover()
        yield flows
    finally:
        await flows.aclose()
        await zygote.aclose()
        store.close()
