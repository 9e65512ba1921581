"""The composition root: makes the handlers and the flows, and gives each of them the few things that it uses.

The only place that knows all concrete classes. Invariant: no flow is given more than it uses, so what a flow can touch
is what its fields name.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.adapters.zygote import Zygote
from cri_shim.config import Config, as_dict
from cri_shim.flows.container_create import CreateContainer
from cri_shim.flows.container_query import QueryContainers
from cri_shim.flows.container_remove import RemoveContainer
from cri_shim.flows.container_start import StartContainer
from cri_shim.flows.container_stop import StopContainer
from cri_shim.flows.exec_sync import ExecSync
from cri_shim.flows.exits import Exits
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.infra import Infra
from cri_shim.flows.locks import Locks
from cri_shim.flows.log_reopen import ReopenContainerLog
from cri_shim.flows.node import Node
from cri_shim.flows.pod_query import QueryPods
from cri_shim.flows.pod_remove import RemovePod
from cri_shim.flows.pod_run import RunPod
from cri_shim.flows.pod_stop import StopPod
from cri_shim.flows.recover import Recover
from cri_shim.kernel import caps
from cri_shim.loader import HandlerOptions, default_handler
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.errors import CriShimError, FailedPrecondition
from cri_shim.model.handler import Handler
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.rpc.edge import Flow
from cri_shim.spec.cgroup_plan import Driver

log = get_logger()


@dataclass(frozen=True, slots=True)
class Base:
    """What the flows stand on."""

    config: Config
    layout: Layout
    store: Store
    zygote: Zygote
    network: Network
    node: NodeFacts
    driver: Driver
    cgroups: Cgroups


def _make_handlers(base: Base, options: Mapping[str, HandlerOptions], exits: Exits) -> Handlers:
    """Every configured handler; one whose node lacks something is left out, loudly."""
    context = HandlerContext(
        layout=base.layout,
        cgroups=base.cgroups,
        zygote=base.zygote,
        conmon=base.config.monitor.conmon,
        limits={"oom_score_adj": _lowest_oom_score_adj()},
        capabilities=caps.effective(),
        exited=exits.exited,
    )
    live: dict[str, Handler] = {}
    for name, option in options.items():
        try:
            live[name] = option.make(context)
        except CriShimError as error:
            log.warning("handler is not available", handler=name, error=str(error))
    default = default_handler(base.config, {name: options[name] for name in live})
    if not live or (base.config.default_handler and default != base.config.default_handler):
        msg = f"the default handler {base.config.default_handler!r} is not available on this node"
        raise FailedPrecondition(msg, hint="install what it needs, or configure another default_handler")
    if not base.config.default_handler and default == "wasm":
        log.warning("runc is not available: pods without a RuntimeClass run as Wasm", default_handler="wasm")
    return Handlers(live=live, rules={name: options[name].rules for name in live}, default=default)


def _lowest_oom_score_adj() -> int:
    """What the kernel lets this daemon give: anything with CAP_SYS_RESOURCE, else not below its own."""
    if caps.can_lower_oom_score_adj():
        return -1000
    own = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    log.warning("without CAP_SYS_RESOURCE no container gets an oom_score_adj below the daemon's own", lowest=own)
    return own
