"""ListContainers and ContainerStatus, from memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from cri_shim.adapters.store import Store
from cri_shim.flows.entries import Entries, Listed
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.image_volumes import with_image_refs
from cri_shim.flows.lookup import existing_container, visible_containers
from cri_shim.model.container import ContainerRecord, ContainerState
from cri_shim.model.errors import CriShimError
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.container_request import current_resources
from cri_shim.spec.stop_signal import signal_enum

_STATES = {
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
}


@dataclass(slots=True)
class QueryContainers:
    """Answers from the records."""

    store: Store
    handlers: Handlers
    _entries: Entries[ContainerRecord, Listed[pb.Container]] = field(default_factory=lambda: Entries(_entry))

    async def list(self, request: pb.ListContainersRequest) -> pb.ListContainersResponse:
        """All containers that match every given field of the filter."""
        entries = self._entries.of(visible_containers(self.store))
        if request.filter.ByteSize():  # the kubelet mostly wants all
            entries = [entry for entry in entries if _matches(entry.message, request.filter)]
        return pb.ListContainersResponse.FromString(b"".join(entry.alone for entry in entries))

    async def status(self, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse:
        """One container; NotFound when there is none."""
        record = existing_container(self.store, request.container_id)
        config = pb.ContainerConfig.FromString(record.config)
        image = pb.ImageSpec()
        image.CopyFrom(config.image)
        image.image = record.image_name
        status = pb.ContainerStatus(
            id=record.id,
            metadata=config.metadata,
            state=_STATES[record.state],
            created_at=record.created_at,
            started_at=record.started_at,
            image=image,
            image_ref=record.image_ref,
            image_id=record.image_id,
            labels=config.labels,
            annotations=config.annotations,
            mounts=with_image_refs(config, record.volumes),
            log_path=record.log_path,
            resources=pb.ContainerResources(linux=current_resources(record)),
            user=pb.ContainerUser(
                linux=pb.LinuxContainerUser(
                    uid=record.user.uid, gid=record.user.gid, supplemental_groups=record.user.groups
                )
            ),
            stop_signal=signal_enum(record.stop_signal),
        )
        if record.exit is not None:
            status.finished_at = record.exit.at
            status.exit_code = record.exit.code
            status.reason = record.exit.reason
            status.message = record.exit.message
        info = {"info": json.dumps(self._verbose(record))} if request.verbose else {}
        return pb.ContainerStatusResponse(status=status, info=info)

    def _verbose(self, record: ContainerRecord) -> dict[str, object]:
        try:
            own = dict(self.handlers.get(record.handler).info(record.id))
        except CriShimError as error:
            own = {"handlerProblem": str(error)}
        return {
            "sandboxID": record.pod_id,
            "pid": record.pid,
            "handler": record.handler,
            "handlerReason": record.decision,
            **own,
        }


def _entry(record: ContainerRecord) -> Listed[pb.Container]:
    config = pb.ContainerConfig.FromString(record.config)
    entry = pb.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        metadata=config.metadata,
        image=config.image,
        image_ref=record.image_ref,
        image_id=record.image_id,
        state=_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
    )
    return Listed(entry, pb.ListContainersResponse(containers=[entry]).SerializeToString())


def _matches(entry: pb.Container, wanted: pb.ContainerFilter) -> bool:
    if not entry.id.startswith(wanted.id) or not entry.pod_sandbox_id.startswith(wanted.pod_sandbox_id):
        return False
    if wanted.HasField("state") and entry.state != wanted.state.state:
        return False
    return all(entry.labels.get(key) == value for key, value in wanted.label_selector.items())
