"""The store: persisted before visible, updates never lose facts, damage is named."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cri_shim.adapters.store import WAL_BYTES, Store
from cri_shim.model.errors import CriShimError, FailedPrecondition, ResourceExhausted
from cri_shim.model.ids import PodId, new_pod_id
from cri_shim.model.pod import PodName, PodRecord


def _pod(name: str = "p") -> PodRecord:
    return PodRecord(
        id=new_pod_id(), name=PodName(name), config=b"\x01", runtime_handler="", handler="runc", created_at=1
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state.db")
    yield opened
    opened.close()


async def test_survives_reopening(tmp_path: Path) -> None:
    pod = _pod()
    first = Store.open(tmp_path / "state.db")
    await first.pods.put(pod)
    await first.pods.update(pod.id, lambda p: msgspec.structs.replace(p, ips=("10.0.0.1",)))
    first.close()
    second = Store.open(tmp_path / "state.db")
    try:
        assert second.pods.get(pod.id) == msgspec.structs.replace(pod, ips=("10.0.0.1",))
        await second.pods.delete(pod.id)
        await second.pods.delete(pod.id)
        assert second.pods.values() == ()
    finally:
        second.close()


async def test_visible_only_when_persisted(store: Store) -> None:
    pod = _pod()
    writing = asyncio.create_task(store.pods.put(pod))
    await asyncio.sleep(0)
    assert store.pods.get(pod.id) is None
    await writing
    assert store.pods.get(pod.id) == pod


async def test_concurrent_updates_keep_each_others_facts(store: Store) -> None:
    pod = _pod()
    await store.pods.put(pod)

    async def add(number: int) -> None:
        await store.pods.update(pod.id, lambda p: msgspec.structs.replace(p, ips=(*p.ips, str(number))))

    await asyncio.gather(*(add(number) for number in range(200)))
    record = store.pods.get(pod.id)
    assert record is not None
    assert record.ips == tuple(str(number) for number in range(200))


async def test_a_cancelled_writer_has_its_change_shown_when_it_ends(store: Store) -> None:
    pod = _pod()
    writing = asyncio.create_task(store.pods.put(pod))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert store.pods.get(pod.id) == pod


async def test_update_of_nothing(store: Store) -> None:
    assert await store.pods.update(PodId("0" * 64), lambda p: p) is None


async def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "state.db")
    try:
        with sqlite3.connect(tmp_path / "state.db") as other:
            other.execute("DROP TABLE pods")
        other.close()
        pod = _pod()
        with pytest.raises(CriShimError, match="cannot write the database"):
            await store.pods.put(pod)
        assert store.pods.get(pod.id) is None
    finally:
        store.close()


async def test_a_full_disk_is_named(store: Store, tmp_path: Path) -> None:
    store._writer._connection.execute("PRAGMA max_page_count = 1")  # no growth, as on a full disk
    with pytest.raises(ResourceExhausted, match=f"^no space left on the file system of {tmp_path};"):
        await store.pods.put(msgspec.structs.replace(_pod(), config=bytes(1 << 16)))


async def test_what_is_forgotten_is_gone_and_its_row_goes_when_it_can(tmp_path: Path) -> None:
    store, pod, other, back = Store.open(tmp_path / "state.db"), _pod(), _pod("other"), _pod("back")
    for record in (pod, other, back):
        await store.pods.put(record)
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("CREATE TRIGGER no BEFORE DELETE ON pods BEGIN SELECT RAISE(ABORT, 'not now'); END")
    for record in (pod, other, back):
        await store.pods.forget(record.id)
    assert store.pods.values() == ()
    assert await store.pods.update(pod.id, lambda p: p) is None
    await store.pods.put(back)
    connection.execute("DROP TRIGGER no")
    rows = "SELECT key FROM pods ORDER BY key"
    assert connection.execute(rows).fetchall() == sorted((record.id,) for record in (pod, other, back))
    await store.pods.put(third := _pod("third"))
    store.close()
    assert connection.execute(rows).fetchall() == sorted((record.id,) for record in (back, third))
    connection.close()


def test_damage_and_newer_schemas_are_named(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database at all" * 100)
    with pytest.raises(FailedPrecondition, match=r"garbage\.db"):
        Store.open(garbage)
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FailedPrecondition, match="schema 99"):
        Store.open(newer)
    damaged = tmp_path / "damaged.db"
    Store.open(damaged).close()
    with sqlite3.connect(damaged) as connection:
        connection.execute("INSERT INTO pods VALUES ('abc', x'ff')")
    connection.close()
    with pytest.raises(FailedPrecondition, match="pods/abc"):
        Store.open(damaged)


def test_the_journal_has_its_room_from_the_start(store: Store, tmp_path: Path) -> None:
    """On a full disk the records of removals must still fit."""
    assert not store.pods.values()
    assert (tmp_path / "state.db-wal").stat().st_blocks * 512 >= WAL_BYTES
