"""Copies on disk: what was stored is what is loaded, and never one lease's tensors under another's name."""

from __future__ import annotations

import asyncio
import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shoal.node.slots import copies
from shoal.node.slots.copies import DISK_RETRY_SECONDS, RETRY_SECONDS, CopyStore, Snapshot, copy_from, pause_after
from shoal.node.storage.blobs import to_bytes
from shoal.protocol.errors import Refused
from shoal.protocol.experts.ownership import Copy
from shoal.protocol.messages import StandInSnapshot
from shoal.protocol.transport.downloads import FetchEnded
from shoal.protocol.transport.wire import Reason


def snapshot(epoch: int, version: int = 3) -> Snapshot:
    published = StandInSnapshot(2, epoch, version, (b"standin",), bytes(16))
    return Snapshot(Copy(epoch, version), {"0.down": torch.full((4,), float(epoch))}, published)


def equal(a: Snapshot, b: Snapshot) -> bool:
    same = a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    return same and (a.copy, a.published) == (b.copy, b.published)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_copy_comes_back_and_a_newer_one_takes_its_place(tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path / "standby", {})
        for epoch in (1, 2):
            await store.store(2, snapshot(epoch))
            assert store.held == {2: Copy(epoch, 3)}
            assert equal(await store.load(2), snapshot(epoch))
        assert [path.name for path in (tmp_path / "standby").iterdir()] == ["slot-2.safetensors"]
        store.drop(2)
        store.drop(2)
        assert (store.held, list((tmp_path / "standby").iterdir())) == ({}, [])

    asyncio.run(work())


def test_what_a_checkpoint_had_is_held_until_something_newer_comes(tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path, {2: snapshot(4), 5: snapshot(1)})
        assert store.held == {2: Copy(4, 3, mine=True), 5: Copy(1, 3, mine=True)}
        assert equal(await store.load(2), snapshot(4))
        await store.store(2, snapshot(6))
        assert equal(await store.load(2), snapshot(6))
        store.drop(5)
        assert store.held == {2: Copy(6, 3)}

    asyncio.run(work())


def test_a_restart_finds_the_copies_on_disk(tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path, {})
        for slot, version in ((2, 7), (3, 3), (4, 3)):
            await store.store(slot, snapshot(4, version))
        await store.store(5, replace(snapshot(4), published=None))
        again = CopyStore(tmp_path, {2: snapshot(4, 6), 3: snapshot(4, 3)})
        assert again.held == {2: Copy(4, 7), 3: Copy(4, 3, mine=True), 4: Copy(4, 3), 5: Copy(4, 3)}
        for slot, version in ((2, 7), (3, 3), (4, 3)):
            assert equal(await again.load(slot), snapshot(4, version))
        assert (await again.load(5)).published is None
        assert names(tmp_path) == ["slot-2.safetensors", "slot-4.safetensors", "slot-5.safetensors"]

    asyncio.run(work())


@pytest.mark.parametrize("damage", ["cut", "empty", "of an older version", "a slot without a number"])
def test_what_a_restart_cannot_make_out_is_cleared_away(damage: str, tmp_path: Path) -> None:
    asyncio.run(CopyStore(tmp_path, {}).store(2, snapshot(1)))
    path = tmp_path / "slot-2.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "of an older version":
        path.write_bytes(to_bytes(snapshot(1).tensors))
    else:
        path.rename(tmp_path / "slot-x.safetensors")
    assert not CopyStore(tmp_path, {}).held
    assert not names(tmp_path)


@pytest.mark.parametrize("part", ["weights", "epoch", "published"])
def test_a_copy_of_which_bytes_have_changed_is_refused(part: str, tmp_path: Path) -> None:
    """As after a write that never reached the disk in full: most of what is there are numbers all the same."""
    weights, standin = torch.randn(64), StandInSnapshot(2, 1, 3, (b"layer",), bytes(16))
    asyncio.run(CopyStore(tmp_path, {}).store(2, Snapshot(Copy(1, 3), {"0.down": weights}, standin)))
    path = tmp_path / "slot-2.safetensors"
    data = path.read_bytes()
    values = weights.numpy().tobytes()
    was, new = {
        "weights": (values, bytes(len(values))),
        "epoch": (b'"epoch":"1"', b'"epoch":"7"'),
        "published": (b"layer", b"other"),
    }[part]
    assert was in data
    path.write_bytes(data.replace(was, new))
    with pytest.raises(Refused):
        asyncio.run(CopyStore(tmp_path, {}).load(2))


def test_what_cannot_be_read_is_left_for_the_next_start(tmp_path: Path) -> None:
    asyncio.run(CopyStore(tmp_path, {}).store(2, snapshot(1)))
    kept = (tmp_path / "slot-2.safetensors").rename(tmp_path / "kept")
    (tmp_path / "slot-2.safetensors").symlink_to(tmp_path / "slot-2.safetensors")  # a loop
    assert not CopyStore(tmp_path, {}).held
    kept.rename(tmp_path / "slot-2.safetensors")
    assert CopyStore(tmp_path, {}).held == {2: Copy(1, 3)}


def test_a_copy_is_refreshed_beside_everything_else_and_can_be_had_meanwhile(tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path, {})
        await store.store(2, snapshot(1))
        asked, answer = 0, asyncio.get_running_loop().create_future()

        async def fetch() -> Snapshot:
            nonlocal asked
            asked += 1
            found: Snapshot = await answer
            return found

        store.refresh(2, fetch)
        store.refresh(2, fetch)
        await asyncio.sleep(0)
        assert asked == 1
        assert equal(await store.load(2), snapshot(1))
        store.stop_refreshing(2)
        answer = asyncio.get_running_loop().create_future()
        store.refresh(2, fetch)
        answer.set_result(snapshot(2))
        async with asyncio.timeout(20):
            await store._refreshing[2]
        assert asked == 2
        assert equal(await store.load(2), snapshot(2))
        assert not store._refreshing

    asyncio.run(work())


def test_what_a_killed_peer_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "slot-2.7.partial").write_bytes(b"half")
    CopyStore(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_copy_and_no_halves(tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path, {})
        await store.store(2, snapshot(1))
        for number in (1, 2):  # of the writes to come
            (tmp_path / f"slot-2.{number}.partial").symlink_to("/dev/full")
            assert not await store.store(2, snapshot(2))
        assert names(tmp_path) == ["slot-2.safetensors"]
        assert equal(await store.load(2), snapshot(1))
        assert await store.store(2, snapshot(3))
        assert equal(await store.load(2), snapshot(3))

    asyncio.run(work())


def test_a_disk_that_lets_nothing_be_written_or_removed_ends_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path, {})
        for name in ("slot-2.0.partial", "slot-2.safetensors"):
            (tmp_path / name).mkdir()
        assert not await store.store(2, snapshot(1))
        store.drop(2)

    asyncio.run(work())


def test_a_write_that_nobody_waits_for_any_more_leaves_nothing(tmp_path: Path) -> None:
    """A slot that is taken over while a newer copy of it is being written down."""

    async def work() -> None:
        loop, begun, may_go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))

        class Slow(dict[str, Any]):
            def items(self) -> Any:
                loop.call_soon_threadsafe(begun.set)
                may_go_on.wait()
                return super().items()

        store = CopyStore(tmp_path, {})
        storing = asyncio.create_task(store.store(2, replace(snapshot(1), tensors=Slow(snapshot(1).tensors))))
        await begun.wait()
        storing.cancel()
        await asyncio.gather(storing, return_exceptions=True)
        may_go_on.set()
        await asyncio.to_thread(int)  # behind the write
        assert names(tmp_path) == []
        assert not store.held

    asyncio.run(work())


def test_what_a_full_disk_did_not_take_is_not_fetched_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every try costs the owner a whole copy."""
    monkeypatch.setattr(copies, "RETRY_SECONDS", 0.0)

    async def work() -> None:
        store = CopyStore(tmp_path, {})
        fetched, again = 0, asyncio.Event()

        async def fetch() -> Snapshot:
            nonlocal fetched
            (tmp_path / f"slot-2.{fetched}.partial").symlink_to("/dev/full")
            fetched += 1
            if fetched > 1:
                again.set()
            return snapshot(1)

        async def ask() -> None:
            while True:
                store.refresh(2, fetch)
                await asyncio.sleep(0.01)

        asking = asyncio.create_task(ask())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(again.wait(), 0.5)
        assert fetched == 1
        asking.cancel()
        store.stop_refreshing(2)

    asyncio.run(work())


@pytest.mark.parametrize("damage", ["cut", "gone", "NaN"])
def test_a_damaged_copy_is_refused(damage: str, tmp_path: Path) -> None:
    async def work() -> None:
        store = CopyStore(tmp_path, {})
        whole = snapshot(1)
        if damage == "NaN":
            whole.tensors["0.down"][1] = torch.nan
        await store.store(2, whole)
        path = tmp_path / "slot-2.safetensors"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "gone":
            path.unlink()
        with pytest.raises((Refused, OSError)):
            await store.load(2)

    asyncio.run(work())


def test_a_copy_that_is_replaced_while_it_is_read_is_not_taken_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts are in another order: under the old epoch they would end in wrong layers, and nobody would notice."""
    reading, replaced = threading.Event(), threading.Event()
    read = copies.read_copy

    def slow(path: Path) -> Any:
        reading.set()
        assert replaced.wait(20)
        return read(path)

    async def work() -> None:
        store = CopyStore(tmp_path, {})
        await store.store(2, snapshot(1))
        with monkeypatch.context() as patched:
            patched.setattr(copies, "read_copy", slow)
            loading = asyncio.create_task(store.load(2))
            assert await asyncio.to_thread(reading.wait, 20)
            await store.store(2, snapshot(2))
            replaced.set()
            with pytest.raises(Refused, match="replaced"):
                await loading
        assert equal(await store.load(2), snapshot(2))

    asyncio.run(work())


def test_whoever_is_busy_is_asked_again_before_a_slot_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "RETRY_SECONDS", 0.01)

    async def work() -> None:
        asked: list[str] = []

        async def fetch(peer: str) -> Snapshot:
            asked.append(peer)
            if peer == "busy" and asked.count(peer) > 3:
                return snapshot(4)
            raise FetchEnded(Reason.BUSY if peer == "busy" else Reason.NOT_FOUND, "no")

        found = await copy_from(["without", "busy"], fetch, slot=2, seconds=10.0)
        assert found is not None
        assert equal(found, snapshot(4))
        assert asked == ["without", "busy", "busy", "busy", "busy"]
        asked.clear()
        assert await copy_from(["without"], fetch, slot=2, seconds=10.0) is None
        assert await copy_from(["busy"], fetch, slot=2, seconds=0.0) is None
        assert asked == ["without", "busy"], "not for ever"

    asyncio.run(work())


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), Refused("busy", "now"), ValueError()])
def test_only_a_disk_is_given_a_minute(error: Exception) -> None:
    assert pause_after(error) == RETRY_SECONDS
    assert pause_after(OSError(errno.ENOSPC, "full")) == DISK_RETRY_SECONDS
