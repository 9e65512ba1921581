"""The composition root: makes the handlers and the flows, and gives each of them the few things that it uses.

The only place that knows all concrete classes. Invariant: no flow is given more than it uses, so what a flow can touch
is what its fields name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cri_shim.adapters.apparmor import AppArmor
from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.content import Content
from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.image_archive import Archives
from cri_shim.adapters.layer_usage import LayerSizes
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.log_file import FollowedLogs
from cri_shim.adapters.mount_sources import MissingSource
from cri_shim.adapters.network import Network
from cri_shim.adapters.pace import pace_of_this_machine
from cri_shim.adapters.registry import Registry
from cri_shim.adapters.registry_auth import RegistryAuth
from cri_shim.adapters.stats import StatsReader
from cri_shim.adapters.store import Store
from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.adapters.zygote import Zygote
from cri_shim.config import Config, as_dict
from cri_shim.flows.attach import Attach
from cri_shim.flows.container_create import CreateContainer
from cri_shim.flows.container_query import QueryContainers
from cri_shim.flows.container_remove import RemoveContainer
from cri_shim.flows.container_start import StartContainer
from cri_shim.flows.container_stop import StopContainer
from cri_shim.flows.container_update import UpdateContainer
from cri_shim.flows.exec import Exec
from cri_shim.flows.exec_sync import ExecSync
from cri_shim.flows.exits import Exits
from cri_shim.flows.explain import ExplainImage
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.image_admin import AdministerImages
from cri_shim.flows.image_check import CheckImages
from cri_shim.flows.image_compile import CompileAhead
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_layers import LayerPuller
from cri_shim.flows.image_layout import ImageLayout
from cri_shim.flows.image_load import ImportImages, LoadImages
from cri_shim.flows.image_names import ImageNames
from cri_shim.flows.image_platform import ImagePlatforms
from cri_shim.flows.image_progress import LayerProgress, PullWithProgress
from cri_shim.flows.image_pull import PullImage, PullPolicy
from cri_shim.flows.image_query import ImageQuery
from cri_shim.flows.image_remove import RemoveImage
from cri_shim.flows.image_save import SaveImages
from cri_shim.flows.image_usage import ImageUsage
from cri_shim.flows.image_volumes import ImageVolumes
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.infra import Infra
from cri_shim.flows.later import Later
from cri_shim.flows.locks import Locks
from cri_shim.flows.log_read import ReadLog
from cri_shim.flows.log_reopen import ReopenContainerLog
from cri_shim.flows.network_settle import SettleNetworks
from cri_shim.flows.network_watch import NetworkWatch
from cri_shim.flows.node import Node
from cri_shim.flows.pod_detach import DetachPod
from cri_shim.flows.pod_ipc import PodIpc
from cri_shim.flows.pod_query import QueryPods
from cri_shim.flows.pod_remove import RemovePod
from cri_shim.flows.pod_run import RunPod
from cri_shim.flows.pod_stop import StopPod
from cri_shim.flows.pod_undo import UndoPod
from cri_shim.flows.pod_update import UpdatePod
from cri_shim.flows.port_forward import PortForward
from cri_shim.flows.recover import Recover
from cri_shim.flows.sampler import Sampler
from cri_shim.flows.stats import Stats
from cri_shim.kernel import caps
from cri_shim.loader import HandlerOptions, default_handler
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.errors import CriShimError, FailedPrecondition
from cri_shim.model.handler import Handler
from cri_shim.model.ids import Digest
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.rpc.edge import Flow, StreamFlow
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.streaming.server import Server as StreamingServer
from cri_shim.wire.oci_image import host_platforms
from cri_shim.wire.proxy import Proxies

log = get_logger()

DRAIN_SECONDS = 10.0
"""How long work that is under way may take when the daemon stops."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the flows stand on."""

    config: Config
    layout: Layout
    store: Store
    zygote: Zygote
    user_namespaces: UserNamespaces
    network: Network
    node: NodeFacts
    driver: Driver
    cgroups: Cgroups
    streaming: StreamingServer


@dataclass(frozen=True, slots=True)
class Flows:
    """All flows of one daemon, by the RPC that calls them."""

    runtime: Mapping[str, Flow]
    image: Mapping[str, Flow]
    admin: Mapping[str, Flow | StreamFlow]
    handlers: Handlers
    exits: Exits
    later: Later
    running: tuple[InFlight[Any, Any], ...]
    """What goes on when its caller leaves, and is waited for when the daemon stops."""
    recovery: Recover
    networks: tuple[NetworkWatch, SettleNetworks]
    images: ImageFlows
    sampler: Sampler

    @classmethod
    def build(cls, base: Base, options: Mapping[str, HandlerOptions]) -> Flows:
        """Wire everything; nothing runs yet."""
        later = Later()
        exits = Exits(base.store, later)
        modules = CompiledModules(base.layout.wasm_cache, base.store.images)
        handlers = _make_handlers(base, options, exits, modules)
        layers = LayerSizes(base.layout)
        images = ImageFlows.build(base, handlers, layers, modules)
        pods, containers = _runtime(base, handlers, exits, later, images)
        watch = NetworkWatch(base.network)
        node = Node(handlers, watch, base.node, base.driver, as_dict(base.config))
        settle = SettleNetworks(base.store, base.layout, base.network, base.config.network.check)
        recovery = Recover(
            store=base.store,
            layout=base.layout,
            handlers=handlers,
            undo_pod=pods.run.undo_pod,
            network=base.network,
            exits=exits,
            create=containers.create,
            image_volumes=containers.create.image_volumes,
            pod_ipc=containers.create.pod_ipc,
            node=base.node,
            clock=pods.run.clock,
        )
        reader = StatsReader(base.cgroups.host)
        stats = Stats(base.store, base.layout, handlers, base.driver, reader, layers)
        runtime: dict[str, Flow] = {
            "Version": node.version,
            "Status": node.status,
            "RuntimeConfig": node.runtime_config,
            "UpdateRuntimeConfig": node.update_runtime_config,
            "RunPodSandbox": pods.run,
            "StopPodSandbox": pods.stop,
            "RemovePodSandbox": pods.remove,
            "PodSandboxStatus": pods.query.status,
            "ListPodSandbox": pods.query.list,
            "CreateContainer": containers.create,
            "StartContainer": containers.start,
            "StopContainer": containers.stop,
            "RemoveContainer": containers.remove,
            "ListContainers": containers.query.list,
            "ContainerStatus": containers.query.status,
            "UpdateContainerResources": containers.update,
            "UpdatePodSandboxResources": pods.update,
            "ReopenContainerLog": containers.reopen_log,
            "ExecSync": containers.exec_sync,
            "Exec": Exec(base.store, handlers, base.streaming),
            "Attach": Attach(base.store, handlers, base.streaming),
            "PortForward": PortForward(base.store, base.layout, base.streaming),
            "ContainerStats": stats.container,
            "ListContainerStats": stats.list_containers,
            "PodSandboxStats": stats.pod,
            "ListPodSandboxStats": stats.list_pods,
        }
        admin: dict[str, Flow | StreamFlow] = {
            **images.admin,
            "ExplainImage": ExplainImage(base.store, base.layout, handlers),
            "ReadLog": ReadLog(base.store, pods.run.clock, containers.reopen_log.followed),
        }
        running = (
            pods.run.runs,
            pods.stop.stops,
            pods.remove.removals,
            containers.create.creations,
            containers.start.starts,
            containers.remove.removals,
        )
        networks, sampler = (watch, settle), Sampler(stats)
        return cls(runtime, images.methods, admin, handlers, exits, later, running, recovery, networks, images, sampler)

    async def recover(self) -> None:
        """Settle what an earlier daemon left, images first: containers stand on them."""
        await self.images.repair()
        await self.recovery.run()
        await self.images.modules.open()
        watch, settle = self.networks
        await settle.run()
        await watch.start()
        self.sampler.start()
        self.images.compile.start()
        self.images.imports.start()

    async def aclose(self) -> None:
        """Let what is under way finish, then stop what cannot outlive the daemon."""
        await self.sampler.aclose()
        await self.images.compile.aclose()
        await self.later.aclose()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.gather(*(group.drain() for group in self.running))
        await asyncio.gather(*(network.aclose() for network in self.networks))
        await asyncio.gather(*(handler.aclose() for handler in self.handlers.live.values()))
        await self.exits.drain()
        await self.images.aclose()


@dataclass(frozen=True, slots=True)
class _Pods:
    run: RunPod
    stop: StopPod
    remove: RemovePod
    update: UpdatePod
    query: QueryPods


@dataclass(frozen=True, slots=True)
class _Containers:
    create: CreateContainer
    start: StartContainer
    stop: StopContainer
    remove: RemoveContainer
    update: UpdateContainer
    query: QueryContainers
    reopen_log: ReopenContainerLog
    exec_sync: ExecSync


def _runtime(
    base: Base, handlers: Handlers, exits: Exits, later: Later, images: ImageFlows
) -> tuple[_Pods, _Containers]:
    store, layout, node = base.store, base.layout, base.node
    clock, locks = Clock(time.time_ns), Locks()
    program = shutil.which(base.config.monitor.infra)
    infra = Infra(store, layout, handlers, node, locks, clock, Path(program).resolve() if program else None)
    stop = StopContainer(store, handlers, exits)
    volumes = ImageVolumes(store, layout, images.collector, locks)
    missing_source = MissingSource(base.config.missing_mount_source)
    remove = RemoveContainer(store, layout, handlers, stop, locks, images.collector, volumes, InFlight())
    containers = _Containers(
        create=CreateContainer(
            store=store,
            layout=layout,
            handlers=handlers,
            infra=infra,
            node=node,
            clock=clock,
            locks=locks,
            collector=images.collector,
            image_volumes=volumes,
            pod_ipc=PodIpc(store, handlers, locks),
            platforms=images.platforms,
            missing_source=missing_source,
        ),
        start=StartContainer(store, handlers, locks, clock, InFlight()),
        stop=stop,
        remove=remove,
        update=UpdateContainer(store, handlers, locks, remove.removals),
        query=QueryContainers(store, handlers),
        reopen_log=ReopenContainerLog(store, handlers, FollowedLogs()),
        exec_sync=ExecSync(store, handlers),
    )
    stop_pod = StopPod(store, layout, DetachPod(store, layout, base.network, clock), infra, stop, locks, node, clock)
    pods = _Pods(
        run=RunPod(
            store=store,
            layout=layout,
            network=base.network,
            user_namespaces=base.user_namespaces,
            handlers=handlers,
            infra=infra,
            node=node,
            clock=clock,
            cgroup_driver=base.driver,
            undo_pod=UndoPod(store, layout, base.network, infra, clock),
            later=later,
        ),
        stop=stop_pod,
        remove=RemovePod(store, layout, stop_pod, containers.remove, InFlight()),
        update=UpdatePod(store),
        query=QueryPods(store, infra),
    )
    return pods, containers


@dataclass(frozen=True, slots=True)
class ImageFlows:
    """The ImageService, and what the admin service has of images."""

    methods: Mapping[str, Flow]
    admin: Mapping[str, Flow | StreamFlow]
    collector: ImageCollector
    registry: Registry
    pull: PullImage
    imports: ImportImages
    layout: ImageLayout
    modules: CompiledModules
    compile: CompileAhead
    platforms: ImagePlatforms

    @classmethod
    def build(cls, base: Base, handlers: Handlers, written: LayerSizes, modules: CompiledModules) -> ImageFlows:
        """Wire everything; nothing runs yet."""
        store, layout, settings = base.store, base.layout, base.config.images
        content, downloads = Content(layout), settings.max_parallel_downloads
        layers = Layers(layout, base.zygote, privileged=base.node.root, workers=downloads + 1)
        collector = ImageCollector(
            store.images,
            store.layers,
            content,
            layers,
            modules,
            store.pulls,
            lambda: _layers_in_use(store),
            time.time_ns,
        )
        registry = Registry(
            [Path(directory) for directory in settings.registry_config],
            auth=RegistryAuth(Path(settings.auth_file) if settings.auth_file else None),
            proxies=Proxies.from_environment(os.environ),
        )
        host = host_platforms(platform.machine())
        platforms = ImagePlatforms(handlers, store.pods, store.images, content, host)
        policy = PullPolicy(
            host=host,
            keep_blobs=settings.keep_blobs,
            serve_local=settings.offline == "serve-local",
            wants_wasm=platforms.of_pull,
            now=time.time_ns,
        )
        puller = LayerPuller(layout, content, layers, store.layers, collector, downloads)
        image_layout = ImageLayout(store.images, content, layout)
        names = ImageNames(store.images, image_layout)
        compile_ahead = CompileAhead(layout, store.images, store.layers, modules, handlers.live.values())
        pull = PullImage(policy, registry, content, store.images, names, collector, puller, compile_ahead)
        query = ImageQuery(
            images=store.images,
            layer_records=store.layers,
            content=content,
            modules=modules,
            layout=layout,
            pinned=settings.pinned,
            written=written.total,
            pick=platforms.pick,
            now=time.time_ns,
        )
        removal = RemoveImage(store.images, collector, image_layout)
        methods: dict[str, Flow] = {
            "PullImage": pull,
            "ListImages": query.list_images,
            "ImageStatus": query.image_status,
            "RemoveImage": removal,
            "ImageFsInfo": query.image_fs_info,
        }
        usage = ImageUsage(store.images, store.layers, content, modules, lambda: _layers_in_use(store))
        administer = AdministerImages(store, names, usage, removal, settings.pinned)
        progress = LayerProgress(store.pulls, store.layers, content)
        loading = LoadImages(Archives(layout, base.zygote), pull, names, progress)
        imports = ImportImages(loading, Path(settings.import_dir) if settings.import_dir else None)
        admin: dict[str, Flow | StreamFlow] = {
            "ListImages": administer.list_images,
            "RemoveImage": administer.remove,
            "TagImage": administer.tag,
            "PinImage": administer.pin,
            "PruneImages": administer.prune,
            "PullImage": PullWithProgress(pull, progress),
            "LoadImages": loading,
            "CheckImages": CheckImages(store, content, layers, modules, collector, image_layout, names, pull),
            "SaveImages": SaveImages(store.images, content, registry, collector, puller, image_layout),
        }
        return cls(methods, admin, collector, registry, pull, imports, image_layout, modules, compile_ahead, platforms)

    async def repair(self) -> None:
        """Make records and disk agree, and keep what failed pulls leave within its bounds."""
        await self.collector.repair()
        await self.layout.write()
        self.collector.start()

    async def aclose(self) -> None:
        """Close the connections to registries."""
        await self.imports.aclose()
        await self.collector.aclose()
        await self.registry.aclose()


def _layers_in_use(store: Store) -> set[Digest]:
    return {layer for container in store.containers.values() for layer in container.layers_in_use}


def _make_handlers(
    base: Base, options: Mapping[str, HandlerOptions], exits: Exits, modules: CompiledModules
) -> Handlers:
    """Every configured handler; one whose node lacks something is left out, loudly."""
    context = HandlerContext(
        layout=base.layout,
        cgroups=base.cgroups,
        zygote=base.zygote,
        user_namespaces=base.user_namespaces,
        modules=modules,
        conmon=base.config.monitor.conmon,
        limits={"oom_score_adj": _lowest_oom_score_adj()},
        capabilities=caps.effective(),
        apparmor=AppArmor(),
        starts=pace_of_this_machine(),
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
