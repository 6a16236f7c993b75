"""Two nodes that a split has made strangers to each other, and that find back."""

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

from directory_nodes import RUN, peer_record
from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from shoal.protocol.directory.dht import RunDHT, start_dht, visible_addresses
from shoal.protocol.directory.directory import Directory
from shoal.protocol.directory.records import record_key, seal_record
from shoal.protocol.identity import Identity


def start(path: Path, known: list[str]) -> RunDHT:
    return start_dht(path, initial_peers=known, host="127.0.0.1", port=0, announce=[], run_id=RUN)


async def lose(_dht: Any, node: DHTNode, *, peer: str) -> None:
    """What requests that nobody answers leave behind, in the DHT process."""
    other = PeerID.from_base58(peer)
    del node.protocol.routing_table[node.protocol.routing_table.get(peer_id=other)]
    for _ in range(5):
        node.blacklist.register_failure(other)
    await node.p2p._client.disconnect(other)


def test_two_that_lost_sight_of_each_other_find_back(tmp_path: Path) -> None:
    a = start(tmp_path / "a", [])
    try:
        b = start(tmp_path / "b", visible_addresses(a))
        try:
            asyncio.run(scenario(tmp_path, a, b))
        finally:
            b.shutdown()
    finally:
        a.shutdown()


async def scenario(folder: Path, a: RunDHT, b: RunDHT) -> None:
    mine, theirs = Identity.load(folder / "a"), Identity.load(folder / "b")
    here, there = Directory(a, mine, RUN), Directory(b, theirs, RUN)
    here_addresses, there_addresses = [await asyncio.to_thread(visible_addresses, dht) for dht in (a, b)]
    assert await there.meet_again() == [], "nobody is known"
    await here.put(peer_record(mine, dht_addrs=here_addresses))
    await there.put(peer_record(theirs, dht_addrs=there_addresses))
    assert set((await there.read()).peers) == {mine.peer_id, theirs.peer_id}
    assert await there.meet_again() == [], "nobody is missing"

    await a.run_coroutine(partial(lose, peer=theirs.peer_id), return_future=True)
    await b.run_coroutine(partial(lose, peer=mine.peer_id), return_future=True)
    key = record_key(RUN, "peer")
    later = peer_record(mine, dht_addrs=here_addresses, step=7, issued_at=time.time() + 1, expires_at=time.time() + 61)
    await here.put(later)
    assert (await there.read()).peers[mine.peer_id].step == 0, f"b still finds what a stores under {key!r}"

    assert await there.meet_again() == [mine.peer_id]
    await here.meet_again()  # who was pinged knows b again, and may ban it still
    assert await here.meet_again() == await there.meet_again() == []
    assert (await there.read()).peers[mine.peer_id].step == 7


def test_who_is_gone_or_has_nonsense_for_an_address_is_not_met(tmp_path: Path) -> None:
    a = start(tmp_path / "a", [])
    try:
        directory = Directory(a, Identity.load(tmp_path / "a"), RUN)
        gone, odd = Identity.generate(), Identity.generate()
        for identity, address in ((gone, "/ip4/127.0.0.1/tcp/1"), (odd, "/ip4/999.0.0.1/tcp/0")):
            record = peer_record(identity, dht_addrs=[f"{address}/p2p/{identity.peer_id}"])
            assert directory.receive(seal_record(identity, RUN, record))
        assert asyncio.run(directory.meet_again()) == []
    finally:
        a.shutdown()
