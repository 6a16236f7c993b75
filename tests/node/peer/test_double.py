"""Two peers with one key, as when a data directory was copied: who comes second ends, who was there says so."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest
from loopback import loopback
from shoal.node.config import PeerConfig
from shoal.node.errors import IdentityInUse, RunNotFound
from shoal.node.peer.links import Links
from shoal.node.peer.peer import run_peer
from shoal.node.run.invite import Invite
from shoal.node.watching.state import Phase
from shoal.protocol.addresses import Address
from shoal.protocol.directory.records import seal_record
from shoal.protocol.identity import Identity
from tiny import manifest_of


def test_two_peers_with_one_key_do_not_go_unnoticed(tmp_path: Path) -> None:
    with loopback(tmp_path, manifest_of(), 1) as swarm:
        links = swarm.peers[0].links

        async def hear_a_copy() -> None:
            mine = links.view().peers[links.peer_id]
            said = msgspec.structs.replace(mine, issued_at=links.clock() + 2, expires_at=links.clock() + 20)
            assert not links.directory.receive(seal_record(links.identity, links.run_id, said))

        assert links.state.snapshot()["last_error"] is None
        swarm.call(hear_a_copy())
        swarm.until(lambda: links.state.snapshot()["last_error"], "it says so")
        error = links.state.snapshot()["last_error"]
        assert error["code"] == "SHOAL-225"
        assert links.peer_id in error["cause"]
        links.check()  # it trains on: it was here first
        for phase in (Phase.JOINING, Phase.SYNCING):
            links.state.enter(phase)
            with pytest.raises(IdentityInUse, match="is a copy"):
                links.check()


def test_who_joins_by_an_invite_to_itself_is_told(tmp_path: Path) -> None:
    """A founder's command mistaken, or a founder's key copied."""
    identity = Identity.load_or_create(tmp_path / "identity.key")
    invite = Invite(addresses=(Address.of_host("127.0.0.1", 4001, identity.peer_id),), run_id="r-0123456789ab")
    config = PeerConfig(
        invite=str(invite), data_dir=tmp_path, role="observer", host="127.0.0.1", http_port=0, join_seconds=1.0
    )
    with pytest.raises(RunNotFound, match="leads to this peer itself"):
        run_peer(config, None)


def test_who_has_left_says_nothing_more(tmp_path: Path) -> None:
    with loopback(tmp_path, manifest_of(), 1) as swarm:
        member = swarm.peers[0].member
        assert member is not None
        swarm.peers[0].links.state.enter(Phase.STOPPED)
        swarm.call(member.run())


def test_a_copy_is_seen_in_the_directory_by_a_peer_that_reads_it_for_nothing_else(tmp_path: Path) -> None:
    """Gossip does not bring it: py-libp2p takes what comes in its own name for its own."""
    with loopback(tmp_path, manifest_of(), 1) as swarm:
        links = swarm.peers[0].links
        (tmp_path / "copy").mkdir()
        shutil.copy(tmp_path / "0" / "identity.key", tmp_path / "copy")

        async def speak_as_often(copy: Links) -> None:
            while True:
                await asyncio.sleep(copy.record_seconds / 5)
                mine, now = links.view().peers[links.peer_id], links.clock()
                said = msgspec.structs.replace(mine, issued_at=now, expires_at=now + copy.record_seconds)
                await copy.directory.put(said)

        with swarm.observer(tmp_path / "copy") as copy:
            assert copy.peer_id == links.peer_id
            copy.record_seconds = links.record_seconds = 5.0
            swarm.network.loop.call_soon_threadsafe(copy.spawn, speak_as_often(copy))
            swarm.until(lambda: links.state.snapshot()["last_error"], "it says so")
            assert links.state.snapshot()["last_error"]["code"] == "SHOAL-225"
