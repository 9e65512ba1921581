"""ReopenContainerLog: after a rotation, new lines go to a new file at the same path."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cri_shim.adapters.log_file import FollowedLogs
from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.lookup import existing_container
from cri_shim.model.container import ContainerState
from cri_shim.model.errors import WrongState
from cri_shim.model.ids import SHORT
from cri_shim.pb import api_pb2 as pb


@dataclass(slots=True)
class ReopenContainerLog:
    """The flow. A failure leaves no new file: the kubelet renames the old one back."""

    store: Store
    handlers: Handlers
    followed: FollowedLogs

    async def __call__(self, request: pb.ReopenContainerLogRequest) -> pb.ReopenContainerLogResponse:
        """Reopen the log of a running container."""
        container = existing_container(self.store, request.container_id)
        if container.state is not ContainerState.RUNNING:
            msg = f"container {container.id[:SHORT]} is {container.state.value}, its log cannot be reopened"
            raise WrongState(msg)
        if container.log_path:
            await self.handlers.get(container.handler).reopen_log(container.id)
            for log in self.followed.of(container.id):
                await asyncio.to_thread(log.rotated)
        return pb.ReopenContainerLogResponse()
