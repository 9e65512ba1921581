"""ReadLog of the admin service: what a container has written, and what it and its successors go on writing.

The lines of `crictl logs`, which reads the file by itself; here the daemon does, so whoever reaches the socket needs no
path. Invariant: an end is looked for before the file is read, so that nothing written before it is missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cri_shim.adapters.log_file import FollowedLogs, LogFile
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Store
from cri_shim.flows.lookup import existing_container
from cri_shim.model.clock import Clock
from cri_shim.model.container import ContainerRecord, ContainerState
from cri_shim.model.errors import FailedPrecondition, InvalidArgument, NotFound
from cri_shim.model.ids import SHORT
from cri_shim.model.pod import PodState
from cri_shim.pb import admin_pb2, api_pb2
from cri_shim.spec.log_window import since
from cri_shim.wire.crilog import Stream
from cri_shim.wire.crilog_reader import LogReader

POLL_SECONDS: Final = 0.2
"""Between two looks at a file that is followed."""


@dataclass(frozen=True, slots=True)
class ReadLog:
    """The RPC."""

    store: Store
    clock: Clock
    followed: FollowedLogs

    async def __call__(self, request: admin_pb2.ReadLogRequest) -> AsyncGenerator[admin_pb2.LogChunk]:
        """To the end of the log; or, followed, until the pod ends, through rotations and restarts of the container."""
        tail = request.tail if request.HasField("tail") else None
        if tail is not None and tail < 0:
            raise InvalidArgument("tail is negative")
        view = _View(since(request.since, self.clock.now()), timestamps=request.timestamps)
        container: ContainerRecord | None = existing_container(self.store, request.container_id)
        while container is not None:
            async for chunk in self._log_of(container, view, tail, follow=request.follow):
                yield chunk
            container = await self._successor(container) if request.follow else None
            tail = None

    async def _log_of(
        self, container: ContainerRecord, view: _View, tail: int | None, *, follow: bool
    ) -> AsyncGenerator[admin_pb2.LogChunk]:
        if not container.log_path:
            msg = f"container {container.id[:SHORT]} has no log: its log_path or the pod's log_directory is empty"
            raise FailedPrecondition(msg)
        log = LogFile(Path(container.log_path))
        self.followed.add(container.id, log)
        try:
            if not await asyncio.to_thread(log.open, tail) and not follow:
                msg = f"the log of container {container.id[:SHORT]} is not there: {container.log_path}"
                raise NotFound(msg)
            view.begin()
            while True:
                over = not follow or self._has_ended(container)
                more, chunks = await asyncio.to_thread(view.read, log)
                for chunk in chunks:
                    yield chunk
                if not more and over:
                    return
                if not more:
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            self.followed.remove(container.id, log)
            await to_the_end(asyncio.to_thread(log.close))

    def _has_ended(self, container: ContainerRecord) -> bool:
        now = self.store.containers.get(container.id)
        return now is None or now.state is ContainerState.EXITED

    async def _successor(self, container: ContainerRecord) -> ContainerRecord | None:
        """The next attempt at the same container, as soon as there is one; None when the pod ends before."""
        name, attempt = _identity(container)
        while True:
            later = {
                number: record
                for record in self.store.containers.values()
                if record.pod_id == container.pod_id and record.committed and not record.infra
                for its_name, number in [_identity(record)]
                if its_name == name and number > attempt
            }
            if later:
                return later[min(later)]
            pod = self.store.pods.get(container.pod_id)
            if pod is None or pod.state is not PodState.READY:
                return None
            await asyncio.sleep(POLL_SECONDS)


@dataclass(slots=True)
class _View:
    """How the entries of a log are shown. `since` in Unix ns."""

    since: int
    timestamps: bool
    _reader: LogReader = field(default_factory=LogReader)
    _within_line: set[Stream] = field(default_factory=set)

    def begin(self) -> None:
        """Another file: what was left of the last line of the one before is lost with it."""
        self._reader = LogReader()

    def read(self, log: LogFile) -> tuple[bool, list[admin_pb2.LogChunk]]:
        """The next piece of a log, and whether there may be more at once. Blocks."""
        data = log.read()
        if not data:
            turned = log.turn_over()
            if turned:
                self.begin()
            return turned, []
        return True, self._shown(data)

    def _shown(self, data: bytes) -> list[admin_pb2.LogChunk]:
        parts: list[tuple[Stream, list[bytes]]] = []
        for entry in self._reader.feed(data):
            if self.since and entry.at < self.since:
                continue
            if not parts or parts[-1][0] is not entry.stream:
                parts.append((entry.stream, []))
            if self.timestamps and entry.stream not in self._within_line:
                parts[-1][1].append(b"%s " % entry.stamp)
            parts[-1][1].append(entry.content)
            (self._within_line.discard if entry.content.endswith(b"\n") else self._within_line.add)(entry.stream)
        return [admin_pb2.LogChunk(data=b"".join(texts), stderr=stream is Stream.STDERR) for stream, texts in parts]


def _identity(record: ContainerRecord) -> tuple[str, int]:
    metadata = api_pb2.ContainerConfig.FromString(record.config).metadata
    return metadata.name, metadata.attempt
