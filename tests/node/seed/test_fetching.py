"""Parts of a seed, fetched by a peer from others over real streams."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from loopback import Loopback, loopback
from shoal.node.seed import fetching
from shoal.node.seed.fetching import fetch_parts
from shoal.node.seed.store import SeedMissing, SeedStore, write_part
from shoal.node.slots.copies import RETRY_SECONDS
from shoal.protocol import resources
from shoal.protocol.transport.downloads import FetchQuery, Resource
from shoal.protocol.transport.fetches import Turns
from tiny import manifest_of

EQUAL = [os.urandom(3_000_000)] * 4  # a dense model's experts begin as copies of one
PARTS = [*EQUAL, b"another"]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("swarm"), manifest_of(), 3) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> SeedStore:
    folder = tmp_path_factory.mktemp("founder")
    start = write_part(folder, msgspec.msgpack.encode([write_part(folder, part) for part in PARTS]))
    return SeedStore(folder, start.hex())


def test_equal_parts_are_fetched_once_by_all_who_want_them_at_the_same_time(
    swarm: Loopback, founder: SeedStore, tmp_path: Path
) -> None:
    asked = Counter[str]()

    async def answer(query: FetchQuery) -> Resource | None:
        asked[query.resource] += 1
        if query.resource == resources.seed_index():
            return Resource(founder.index_bytes() or b"")
        return Resource(founder.need(int(query.resource.split("/")[1])))

    joiner, *holders = swarm.peers
    for holder in holders:
        holder.links.transport.serve(answer)
    store, turns = SeedStore(tmp_path / "joiner", founder.start), Turns(1)

    async def fetch(*numbers: int) -> None:
        await fetch_parts(joiner.links, store, lambda: numbers, turns, max_bytes=4_000_000, seconds=10.0)

    async def claim_all() -> None:
        await fetch()  # the index
        await asyncio.gather(*map(fetch, range(len(EQUAL))))

    swarm.call(claim_all())
    assert [store.need(number) for number in range(len(EQUAL))] == EQUAL
    assert asked.total() == 2, asked


def test_a_damaged_part_is_fetched_again(swarm: Loopback, founder: SeedStore, tmp_path: Path) -> None:
    async def answer(query: FetchQuery) -> Resource | None:
        return Resource(founder.need(int(query.resource.split("/")[1])))

    joiner, *holders = swarm.peers
    for holder in holders:
        holder.links.transport.serve(answer)
    store = SeedStore(tmp_path, founder.start)
    assert store.put_index(founder.index_bytes() or b"")
    assert store.put(4, PARTS[4])
    (tmp_path / store.name(4)).write_bytes(b"anothet")
    swarm.call(fetch_parts(joiner.links, store, lambda: [4], Turns(1), max_bytes=4_000_000, seconds=10.0))
    assert store.need(4) == PARTS[4]


def test_one_slow_holder_does_not_keep_a_newcomer_from_beginning(
    swarm: Loopback, founder: SeedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "HOLDER_SECONDS", 0.5)
    joiner, *holders = swarm.peers
    slow = min(holders, key=lambda holder: hash((joiner.peer_id, holder.peer_id)))  # the first to be asked
    waited = 0

    async def answer_slowly(query: FetchQuery) -> Resource | None:
        nonlocal waited
        waited += 1
        await asyncio.sleep(20.0)
        return None

    async def answer(query: FetchQuery) -> Resource | None:
        if query.resource == resources.seed_index():
            return Resource(founder.index_bytes() or b"")
        return Resource(founder.need(int(query.resource.split("/")[1])))

    for holder in holders:
        holder.links.transport.serve(answer_slowly if holder is slow else answer)
    store, began = SeedStore(tmp_path / "joiner", founder.start), time.monotonic()
    numbers = range(len(PARTS))
    swarm.call(fetch_parts(joiner.links, store, lambda: numbers, Turns(1), max_bytes=4_000_000, seconds=10.0))
    assert [store.need(number) for number in numbers] == PARTS
    assert time.monotonic() - began < 10.0
    assert waited == 1, "it is asked last from then on"


def test_a_slot_whose_first_experts_are_nowhere_to_be_had_is_tried_again(swarm: Loopback) -> None:
    peer = swarm.peers[0]

    async def missing(slot: int) -> None:
        raise SeedMissing(f"no peer gave the experts of slot {slot}")

    async def claim() -> list[BaseException | None]:
        peer.keeper._spawn(1, peer.keeper._claim(1, 1))
        assert 1 in peer.keeper._busy
        tasks = list(peer.keeper._tasks)
        await asyncio.wait(tasks)
        return [task.exception() for task in tasks]

    peer.exchange.fetch_first = missing
    try:
        assert swarm.call(claim()) == [None]
    finally:
        peer.exchange.fetch_first = None
    assert 1 not in peer.keeper._busy


def test_what_the_disk_did_not_take_is_not_fetched_again_at_once(swarm: Loopback) -> None:
    """Every try costs its holder a whole part."""
    peer = swarm.peers[0]

    async def full(slot: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")

    async def claim() -> None:
        peer.keeper._spawn(1, peer.keeper._claim(1, 1))
        (claiming,) = peer.keeper._tasks
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(claiming, 1.5 * RETRY_SECONDS)

    peer.exchange.fetch_first = full
    try:
        swarm.call(claim())
    finally:
        peer.exchange.fetch_first = None
