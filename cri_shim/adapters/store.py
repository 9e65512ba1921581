"""The daemon's memory: records of pods, containers, images, layers and pulls, in SQLite and in process.

Not a cache and not a query engine: readers get immutable records from memory, in the event loop, at any time. Writers
wait until their change is in the database, cancelled ones too: who cleans up after a cancellation sees what it cleans
up. Invariant: a record is visible only after it is persisted.

One thread owns the connection. It takes all changes that have queued up since its last commit into one transaction, so
a burst of pod creations costs a few commits. WAL with `synchronous=NORMAL`: a killed daemon loses nothing; a power cut
may lose the last commits, and with them everything that they described is gone too. The WAL has its room on the disk
from the start: on a full one pods are still stopped and removed, which is how it gets room again. Where even that is
taken, what is gone is forgotten nevertheless, and its row goes as soon as there is room.
"""

# mypy: disable-error-code="explicit-override"
from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

import msgspec

from cri_shim.adapters.full_disk import disk_full
from cri_shim.log import get_logger
from cri_shim.model.container import ContainerRecord
from cri_shim.model.errors import FailedPrecondition, ResourceExhausted
from cri_shim.model.ids import ContainerId, Digest, ImageId, PodId
from cri_shim.model.image import ImageRecord, LayerRecord, UnfinishedPull
from cri_shim.model.pod import PodRecord

log = get_logger()

SCHEMA = 1
WAL_BYTES = 5 << 20
"""More than SQLite's automatic checkpoint (1000 pages) lets it grow to."""


class Keyed(Protocol):
    """A record that knows its key."""

    @property
    def key(self) -> str: ...


K = TypeVar("K", bound=str)
R = TypeVar("R", bound=Keyed)


class _Commit(asyncio.Future[None]):
    """Done when a change is in the database. A writer that is cancelled meanwhile is cancelled then, not before."""

    def cancel(self, msg: object = None) -> bool:
        del msg
        return False


@dataclass(frozen=True, slots=True)
class _Write:
    """One change of one row (`body` None = delete). `settle` is called in `loop`, with the error if there is one.

    `owed`: when it fails it is made up for after one that does not.
    """

    table: str
    key: str
    body: bytes | None
    loop: asyncio.AbstractEventLoop
    settle: Callable[[Exception | None], None]
    owed: bool = False

    @property
    def row(self) -> tuple[str, str]:
        """Which row of the database."""
        return self.table, self.key

    def statement(self) -> tuple[str, tuple[object, ...]]:
        # The table is one of our constants; only values come from outside.
        if self.body is None:
            return f"DELETE FROM {self.table} WHERE key = ?", (self.key,)  # noqa: S608
        return f"INSERT OR REPLACE INTO {self.table} VALUES (?, ?)", (self.key, self.body)  # noqa: S608


class Table(Generic[K, R]):
    """Records of one kind, by key. All methods belong to the event loop."""

    def __init__(self, name: str, kind: type[R], writer: _Writer) -> None:
        self._name = name
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._writer = writer
        self._records: dict[str, R] = {}
        self._pending: dict[str, R | None] = {}

    def get(self, key: K) -> R | None:
        """The record, or None."""
        return self._records.get(key)

    def values(self) -> tuple[R, ...]:
        """All records, as of now."""
        return tuple(self._records.values())

    def keys(self) -> tuple[K, ...]:
        """All keys, as of now."""
        return cast("tuple[K, ...]", tuple(self._records))

    async def put(self, record: R) -> None:
        """Persist the record in place of the one with its key, then make it visible."""
        await self._write(cast("K", record.key), record)

    async def update(self, key: K, change: Callable[[R], R]) -> R | None:
        """Replace a record by `change` of its latest value; None when it is gone.

        Latest includes changes that are still being written, so updates of one record never lose each other's facts.
        """
        record = self._pending.get(key) if key in self._pending else self._records.get(key)
        if record is None:
            return None
        changed = change(record)
        if changed is not record:
            await self._write(key, changed)
        return changed

    async def delete(self, key: K) -> None:
        """Remove the record; absent = success."""
        if key in self._records or key in self._pending:
            await self._write(key, None)

    async def forget(self, key: K) -> None:
        """Remove the record of what is gone, or will be next: nobody sees it any more, whatever becomes of its row.

        A row that cannot be deleted now is deleted later, if need be by who finds at the next start that it describes
        nothing.
        """
        if self._records.pop(key, None) is None and key not in self._pending:
            return
        try:
            await self._write(key, None, owed=True)
        except ResourceExhausted as error:
            log.warning("a record is forgotten and still in the database", table=self._name, key=key, error=str(error))

    async def _write(self, key: K, record: R | None, *, owed: bool = False) -> None:
        self._pending[key] = record
        body = None if record is None else self._encoder.encode(record)
        committed = _Commit()

        def settle(error: Exception | None) -> None:
            self._settle(key, record, None if owed else error)
            if error is None:
                committed.set_result(None)
            else:
                committed.set_exception(error)

        self._writer.write(_Write(self._name, key, body, committed.get_loop(), settle, owed))
        await committed

    def _settle(self, key: K, record: R | None, error: Exception | None) -> None:
        if self._pending.get(key) is record:
            self._pending.pop(key, None)
        if error is not None:
            return
        if record is None:
            self._records.pop(key, None)
        else:
            self._records[key] = record

    def load(self, connection: sqlite3.Connection) -> None:
        """Read every row; one that cannot be decoded is an error that names it."""
        for key, body in connection.execute(f"SELECT key, body FROM {self._name}"):  # noqa: S608 (a constant name)
            try:
                self._records[key] = self._decoder.decode(body)
            except msgspec.DecodeError as error:
                msg = f"the record {self._name}/{key} in the database cannot be read: {error}"
                raise FailedPrecondition(
                    msg, hint="it was written by a newer version, or the file is damaged"
                ) from error


class _Writer:
    """The thread that owns the connection."""

    def __init__(self, connection: sqlite3.Connection, directory: Path) -> None:
        self._connection = connection
        self._directory = directory
        self._owed: dict[tuple[str, str], _Write] = {}
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def write(self, change: _Write) -> None:
        """Queue one change."""
        self._queue.put(change)

    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while True:
            first = self._queue.get()
            batch = [first]
            with contextlib.suppress(queue.Empty):
                while batch[-1] is not None:
                    batch.append(self._queue.get_nowait())
            if writes := [write for write in batch if write is not None]:
                self._commit(writes)
            if batch[-1] is None:
                break
        self._make_up()
        self._connection.close()

    def _commit(self, batch: list[_Write]) -> None:
        error = self._transact(batch)
        if error is None:
            for write in batch:
                self._owed.pop(write.row, None)
            self._make_up()
        else:
            self._owed.update((write.row, write) for write in batch if write.owed)
        # A closed loop has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            batch[0].loop.call_soon_threadsafe(_settle, batch, error)

    def _make_up(self) -> None:
        if self._owed and self._transact(tuple(self._owed.values())) is None:
            self._owed.clear()

    def _transact(self, batch: Sequence[_Write]) -> ResourceExhausted | None:
        try:
            with self._connection:
                if len(batch) > 1:  # a statement alone is a transaction, at a third of the steps
                    self._connection.execute("BEGIN")
                for write in batch:
                    self._connection.execute(*write.statement())
        except sqlite3.Error as failure:
            if getattr(failure, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                return disk_full(self._directory)
            msg = f"cannot write the database: {failure}"
            return ResourceExhausted(msg, hint="check the space and the health of the disk that holds `root`")
        return None


def _settle(batch: list[_Write], error: Exception | None) -> None:
    for write in batch:
        write.settle(error)


def _reserve(wal: Path) -> None:
    """Give the WAL its room. Zeros behind its last frame mean nothing to SQLite, and it never shortens the file."""
    with contextlib.suppress(OSError), wal.open("r+b") as file:  # full already, or a file system that cannot
        os.posix_fallocate(file.fileno(), 0, WAL_BYTES)


class Store:
    """The tables. Open with `Store.open`, in a thread; close when no write is under way."""

    def __init__(self, connection: sqlite3.Connection, directory: Path) -> None:
        self._writer = _Writer(connection, directory)
        self.pods: Table[PodId, PodRecord] = Table("pods", PodRecord, self._writer)
        self.containers: Table[ContainerId, ContainerRecord] = Table("containers", ContainerRecord, self._writer)
        self.images: Table[ImageId, ImageRecord] = Table("images", ImageRecord, self._writer)
        self.layers: Table[Digest, LayerRecord] = Table("layers", LayerRecord, self._writer)
        self.pulls: Table[Digest, UnfinishedPull] = Table("pulls", UnfinishedPull, self._writer)
        self.pods.load(connection)
        self.containers.load(connection)
        self.images.load(connection)
        self.layers.load(connection)
        self.pulls.load(connection)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open or make the database. Raises FailedPrecondition when it cannot be used."""
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            msg = f"cannot open the database {path}: {error}"
            raise FailedPrecondition(msg) from error
        try:
            _prepare(connection, path)
            store = cls(connection, path.parent)
        except BaseException:
            connection.close()
            raise
        store._writer.start()
        return store

    def close(self) -> None:
        """Wait for queued writes and close the file."""
        self._writer.close()


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set the journal up and make the tables. Raises FailedPrecondition for what is no database of ours."""
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA cache_size = -512")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            msg = f"the database {path} has schema {version}, this version knows {SCHEMA}"
            raise FailedPrecondition(msg, hint="run the newer cri-shim that wrote it")
        with connection:
            for table in ("pods", "containers", "images", "layers", "pulls"):
                columns = "(key TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID"
                connection.execute(f"CREATE TABLE IF NOT EXISTS {table} {columns}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
    except sqlite3.Error as error:
        msg = f"cannot open the database {path}: {error}"
        raise FailedPrecondition(msg) from error
    _reserve(path.with_name(f"{path.name}-wal"))
