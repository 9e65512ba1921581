"""CreateContainer: name, image, record, root file system, dispatch, the handler's own preparation, CREATED.

Not a start: nothing of the user's runs. Invariant: the record is there before the first side effect; a failure leaves
nothing, and a repeated equal request gets the container that the first one made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cri_shim.adapters import image_directories, mount_sources, rootfs, selinux_labels
from cri_shim.adapters.mount_sources import MissingSource
from cri_shim.adapters.rootfs import RootfsFacts
from cri_shim.adapters.store import Store
from cri_shim.flows.container_remove import discard
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_platform import ImagePlatforms
from cri_shim.flows.image_volumes import ImageVolumes
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.infra import Infra
from cri_shim.flows.locks import Locks
from cri_shim.flows.lookup import existing_pod, find_container
from cri_shim.flows.pod_ipc import PodIpc
from cri_shim.flows.undo import Undo
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.container import ContainerName, ContainerRecord, ContainerState, ImageVolume
from cri_shim.model.entry import EntryKind, EntryPoint
from cri_shim.model.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, WrongState
from cri_shim.model.handler import ContainerPlan, Kind, PodContext
from cri_shim.model.ids import SHORT, ContainerId, Digest, PodId, new_container_id
from cri_shim.model.image import ImageRecord, LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.pod import PodRecord, PodState
from cri_shim.model.refs import find_images
from cri_shim.model.selinux import Label
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import container_request as spec
from cri_shim.spec import dispatch
from cri_shim.spec.pod import context, current_config, shares_pid
from cri_shim.spec.process import process_args, process_plan
from cri_shim.spec.selinux import with_options
from cri_shim.spec.stop_signal import stop_signal
from cri_shim.spec.users import UserDatabase

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request, resolved as far as it can be without touching anything."""

    pod: PodRecord
    pod_config: pb.PodSandboxConfig
    config: pb.ContainerConfig
    image: ImageRecord
    volumes: tuple[ImageVolume, ...]
    log_path: str
    stop_signal: int


@dataclass(slots=True)
class CreateContainer:
    """The flow. Equal requests for one name share one run."""

    store: Store
    layout: Layout
    handlers: Handlers
    infra: Infra
    node: NodeFacts
    clock: Clock
    locks: Locks
    collector: ImageCollector
    image_volumes: ImageVolumes
    pod_ipc: PodIpc
    platforms: ImagePlatforms
    missing_source: MissingSource
    creations: InFlight[ContainerName, ContainerId] = field(default_factory=InFlight)

    async def __call__(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        """Create a container, or return the id of the one that an equal request has made."""
        pod = existing_pod(self.store, request.pod_sandbox_id)
        if pod.state is not PodState.READY:
            msg = f"pod sandbox {pod.id[:SHORT]} is not ready"
            raise WrongState(msg, hint=pod.problem)
        name = spec.container_name(request.config, pod.id)
        if self.creations.differs(name, request.config):
            msg = f"container {request.config.metadata.name} of the pod is being made from a different request"
            raise AlreadyExists(msg)
        if name not in self.creations and (known := self._by_name(name)) is not None:
            if known.state is not ContainerState.PENDING:
                return pb.CreateContainerResponse(container_id=_same(known, request.config))
            await self._clear(known)
        asked = self._resolve(pod, request.config)
        container_id = await self.creations.join(name, lambda: self._create(name, asked), request.config)
        return pb.CreateContainerResponse(container_id=container_id)

    def plan(self, record: ContainerRecord) -> ContainerPlan:
        """The plan of a container that an earlier daemon has made; what it read from the image is not read again."""
        pod = self.store.pods.get(record.pod_id)
        if pod is None:
            msg = f"pod sandbox {record.pod_id[:SHORT]} of container {record.id[:SHORT]} is gone"
            raise NotFound(msg)
        if record.infra:
            return self.infra.plan(pod)
        image = self.store.images.get(record.image_id)
        pod_config = current_config(pod)
        return spec.adopted_plan(
            record, context(pod.id, pod_config, self.layout, self.node, pod.selinux_level), image, self.layout
        )

    def _by_name(self, name: ContainerName) -> ContainerRecord | None:
        return next((c for c in self.store.containers.values() if c.name == name), None)

    def _resolve(self, pod: PodRecord, config: pb.ContainerConfig) -> _Asked:
        pod_config = current_config(pod)
        spec.check(config, pod_config)
        image = self._image(pod, config)
        return _Asked(
            pod=pod,
            pod_config=pod_config,
            config=config,
            image=image,
            volumes=self.image_volumes.find(config),
            log_path=spec.log_path(pod_config.log_directory, config.log_path),
            stop_signal=stop_signal(config.stop_signal, image.config.stop_signal),
        )

    def _image(self, pod: PodRecord, config: pb.ContainerConfig) -> ImageRecord:
        """The image that is meant, of several platforms under one name too."""
        wanted = config.image.image
        if not wanted:
            msg = "image.image is empty"
            raise InvalidArgument(msg)
        found = find_images(self.store.images.values(), wanted)
        if not found:
            msg = f"image {wanted!r} is not on this node"
            raise NotFound(msg, hint="pull it first")
        return self.platforms.of_container(found, pod, config)

    async def _create(self, name: ContainerName, asked: _Asked) -> ContainerId:
        await self.platforms.require(asked.image, asked.pod, asked.config)
        container_id = new_container_id()
        async with self.locks.hold(container_id), Undo("create container") as undo:
            record = ContainerRecord(
                id=container_id,
                pod_id=asked.pod.id,
                name=name,
                config=asked.config.SerializeToString(),
                handler=asked.pod.handler,
                image_id=asked.image.id,
                image_ref=next(iter(asked.image.repo_digests), asked.image.id),
                image_name=next(iter(asked.image.repo_tags), asked.config.image.image),
                layers=asked.image.layers,
                volumes=asked.volumes,
                created_at=self.clock.now(),
                log_path=asked.log_path,
                stop_signal=asked.stop_signal,
            )
            undo.push("release the image volumes", lambda: self.image_volumes.release(record))
            undo.push("delete the record", lambda: self._forget(container_id, undo))
            await self.store.containers.put(record)
            self._require_ready(asked.pod.id)  # a stop from now on finds the record, and waits
            await self.collector.settle()
            undo.push("remove the container", lambda: self._discard(container_id))
            await self._make(record, asked)
        log.info("container created", container=container_id[:SHORT], pod=asked.pod.id[:SHORT], name=name)
        return container_id

    async def _make(self, record: ContainerRecord, asked: _Asked) -> None:
        layers = [self._layer(key) for key in asked.image.layers]
        pod = context(asked.pod.id, asked.pod_config, self.layout, self.node, asked.pod.selinux_level)
        options = asked.config.linux.security_context.selinux_options
        label = with_options(pod.selinux, options) if pod.selinux is not None else None
        root, files = await asyncio.to_thread(_prepare, self.layout, record, layers, pod, label, _entry_point(asked))
        rules = self.handlers.for_pod(asked.pod.handler)
        decision = dispatch.decide(
            self.handlers.rules, rules, spec.subject(asked.config, asked.pod_config, asked.image, files.entry)
        )
        handler = self.handlers.get(decision.handler)
        if pod.ids is not None:
            await self.handlers.require_user_namespaces(decision.handler)
        if handler.kind is Kind.LINUX:
            if self.node.root:
                await self.pod_ipc.ensure(asked.pod, pod)
            if shares_pid(asked.pod_config):
                await self.infra.ensure(asked.pod, decision.handler)
        env = self.handlers.rules[decision.handler].default_env
        process = process_plan(asked.config, pod.hostname, asked.image, files.users, env)
        placed = await self.image_volumes.mount(record, asked.config, pod)
        if asked.image.config.volumes:
            taken = [mount.container_path for mount in placed.mounts]
            declared = asked.image.config.volumes
            directories = await asyncio.to_thread(
                image_directories.make, self.layout, record.id, root, declared, taken, pod.ids
            )
            placed = spec.with_directories(placed, directories)
        plan = ContainerPlan(
            id=record.id,
            pod=pod,
            config=placed,
            process=process,
            image=asked.image,
            rootfs=root,
            bundle=self.layout.bundle(record.id),
            log_path=Path(asked.log_path) if asked.log_path else None,
            stop_signal=asked.stop_signal,
            target_pid=self._target_pid(asked),
            selinux=label,
            annotations=spec.passed_annotations(asked.config, asked.pod_config, rules, decision),
        )
        if decision.handler != record.handler:
            # Known before the handler acts, so that recovery asks the right one.
            await self.store.containers.update(
                record.id, lambda old: msgspec.structs.replace(old, handler=decision.handler)
            )
        if asked.config.mounts:
            await asyncio.to_thread(mount_sources.ensure, asked.config.mounts, self.missing_source)
        if label is not None and handler.kind is Kind.LINUX:
            await asyncio.to_thread(selinux_labels.relabel_volumes, placed.mounts, label)
        await handler.create(plan)
        self._require_ready(asked.pod.id)
        await self.store.containers.update(
            record.id,
            lambda old: msgspec.structs.replace(old, decision=decision.reason, user=process.user, committed=True),
        )

    def _require_ready(self, pod_id: PodId) -> None:
        pod = self.store.pods.get(pod_id)
        if pod is None or pod.state is not PodState.READY:
            msg = f"pod sandbox {pod_id[:SHORT]} was stopped while the container was being made"
            raise WrongState(msg)

    def _layer(self, key: Digest) -> LayerRecord:
        layer = self.store.layers.get(key)
        if layer is None:
            msg = f"layer {key} of the image is not on this node"
            raise FailedPrecondition(msg, hint="remove the image and pull it again")
        return layer

    def _target_pid(self, asked: _Asked) -> int:
        """The process whose PID namespace is joined (NamespaceMode TARGET)."""
        options = asked.config.linux.security_context.namespace_options
        if options.pid != pb.TARGET:
            return 0
        target = find_container(self.store, options.target_id)
        runs_here = target is not None and target.pod_id == asked.pod.id and target.state is ContainerState.RUNNING
        if target is None or not runs_here:
            msg = (
                f"namespace_options.target_id: {options.target_id[:SHORT]!r} is not a running container of the same pod"
            )
            raise FailedPrecondition(msg)
        if self.handlers.get(target.handler).kind is not Kind.LINUX:
            # Its worker, where it has one, is in the node's own namespace: nobody may join that by it.
            msg = f"namespace_options.target_id: {target.id[:SHORT]} is a Wasm module, which has no PID namespace"
            raise FailedPrecondition(msg, hint="leave the target out (kubectl debug without --target)")
        return target.pid

    async def _clear(self, leftover: ContainerRecord) -> None:
        """An earlier attempt could not be undone: the name is free when that succeeds now."""
        async with self.locks.hold(leftover.id):
            await self._discard(leftover.id)
            await self.store.containers.delete(leftover.id)
        await self.image_volumes.release(leftover)

    async def _discard(self, container_id: ContainerId) -> None:
        record = self.store.containers.get(container_id)
        if record is not None:
            await discard(self.store, self.layout, self.handlers, record)

    async def _forget(self, container_id: ContainerId, undo: Undo) -> None:
        # A record whose things could not all be removed stays, PENDING: the next start of the daemon tries again, and
        # so does the removal of the pod.
        if not undo.failures:
            await self.store.containers.delete(container_id)


def _prepare(
    layout: Layout,
    record: ContainerRecord,
    layers: Sequence[LayerRecord],
    pod: PodContext,
    label: Label | None,
    entry: EntryPoint,
) -> tuple[Path | None, RootfsFacts]:
    """Bundle, mounted root file system and what is read from it, in one go. A Wasm artifact has no files."""
    if label is not None:
        selinux_labels.check(label)
    rootfs.make_bundle(layout, record.id, pod.ids)
    if record.log_path:
        Path(record.log_path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not layers:
        return None, RootfsFacts(UserDatabase(), EntryKind.MISSING)
    path = rootfs.prepare(layout, record.id, layers, pod, label.mount if label else "")
    return path, rootfs.read_facts(path, entry)


def _entry_point(asked: _Asked) -> EntryPoint:
    return spec.entry_point(process_args(asked.config, asked.image)[0], asked.config, asked.image)


def _same(known: ContainerRecord, config: pb.ContainerConfig) -> ContainerId:
    """The id, when the request repeats the one that made the container and nothing has happened to it since."""
    if pb.ContainerConfig.FromString(known.config) != config:
        difference = "a different configuration"
    elif known.state is not ContainerState.CREATED:
        difference = f"state {known.state.value}"
    else:
        return known.id
    msg = f"container {config.metadata.name} of the pod exists with {difference}"
    raise AlreadyExists(msg, hint=f"remove container {known.id[:SHORT]} or use another attempt")
