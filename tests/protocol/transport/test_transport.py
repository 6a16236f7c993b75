"""Gossip and peers, with real py-libp2p hosts in real processes."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from shoal.protocol.errors import PeerUnreachable, TransportError
from shoal.protocol.identity import Identity
from shoal.protocol.transport.downloads import Resource
from shoal.protocol.transport.limits import MAX_PUBLISH_BYTES
from transports import PATIENCE_SECONDS, gossiping, reached, run, serve, swarm, until


@pytest.mark.parametrize("count", [2, 5])
def test_a_burst_arrives_whole_at_all(tmp_path: Path, count: int) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, count) as peers:
            listeners = await gossiping(peers, "burst")
            burst = [os.urandom(1000) for _ in range(40)]
            began = time.monotonic()
            await asyncio.gather(*(peers[0].publish("burst", message) for message in burst))

            def arrived() -> list[int]:
                return [len({data for _, data in li.messages} & set(burst)) for li in listeners[1:]]

            await until(lambda: all(n == len(burst) for n in arrived()), f"{len(burst)} messages at all")
            print(f"\n{count} hosts: 40 of 40 messages of 1 kB at every peer after {time.monotonic() - began:.2f} s")
            for listener in listeners[1:]:
                received = [data for sender, data in listener.messages if sender == peers[0].peer_id and data in burst]
                assert received == burst  # no duplicates, and in order: all come straight from the publisher
            assert all(peer.counters.gossip_dropped_in == peer.counters.gossip_dropped_out == 0 for peer in peers)

    run(scenario())


def test_a_large_message_arrives_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 3) as peers:
            listeners = await gossiping(peers, "large")
            data = os.urandom(800_000)
            await peers[1].publish("large", data)
            for i in (0, 2):
                await until(lambda i=i: (peers[1].peer_id, data) in listeners[i].messages, "800 kB")
            await until(lambda: peers[2].counters.gossip_bytes_received > 800_000, "counters")
            with pytest.raises(ValueError, match="900000"):
                await peers[0].publish("large", bytes(MAX_PUBLISH_BYTES + 1))

    run(scenario())


def test_a_slow_handler_loses_the_oldest_messages_and_every_loss_is_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2, gossip_queue_messages=8, gossip_window=2) as peers:
            listeners = await gossiping(peers, "warm")
            gate, handled = asyncio.Event(), list[bytes]()

            async def slow(_sender: str, data: bytes) -> None:
                await gate.wait()
                handled.append(data)
                if len(handled) == 1:
                    raise RuntimeError("a handler's bug costs one message")

            await peers[1].subscribe("slow", slow)
            await peers[0].subscribe("slow", lambda *_: None)
            messages = [b"%d" % i for i in range(40)]
            for message in messages:
                await peers[0].publish("slow", message)
            await peers[0].publish("warm", b"after")
            await until(lambda: listeners[1].messages, "another topic is not held up")
            await until(lambda: peers[1].counters.gossip_dropped_in == 30, "30 drops")
            gate.set()
            await until(lambda: len(handled) == 10, "the rest")
            assert handled[-8:] == messages[-8:]

    run(scenario())


def test_one_peer_id_everywhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (one, two):
            assert one.peer_id == Identity.load(tmp_path / "0.key").peer_id
            assert all(addr.endswith(f"/p2p/{one.peer_id}") for addr in one.addrs)
            await two.connect(one.addrs)
            await until(lambda: one.connected_peers() == {two.peer_id})
            assert two.connected_peers() == {one.peer_id}
            stranger = Identity.generate().peer_id
            with pytest.raises(PeerUnreachable, match="cannot connect"):
                await two.connect([addr.replace(one.peer_id, stranger) for addr in one.addrs])
            await two.disconnect(one.peer_id)
            await until(lambda: not one.connected_peers())

    run(scenario())


def test_gossip_heals_after_each_host_in_turn_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 3) as peers:
            listeners = await gossiping(peers, "healing")
            for peer in peers[:2]:
                addrs, restarted = peer.addrs, asyncio.Event()
                await asyncio.gather(*(peer.publish("healing", b"%d" % i) for i in range(300)))  # its numbers run ahead
                peer.on_restart.append(restarted.set)
                os.kill(peer.host_pid or 0, signal.SIGKILL)
                await asyncio.wait_for(restarted.wait(), PATIENCE_SECONDS)
                assert peer.addrs == addrs
                await reached(peers, listeners, "healing")

    run(scenario())


def test_a_host_that_keeps_dying_is_fatal(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2, restarts_per_minute=1) as (peer, other):
            serve(other, x=Resource(bytes(50_000_000)))
            fetching = asyncio.create_task(peer.fetch(other.addrs, "x", deadline_seconds=30, max_bytes=10**8))
            for restarts in (0, 1):
                await until(lambda n=restarts: peer.restarts == n and peer.host_pid)
                os.kill(peer.host_pid or 0, signal.SIGKILL)
            await asyncio.wait_for(peer.fatal.wait(), PATIENCE_SECONDS)
            assert "signal 9" in peer.fatal_reason
            with pytest.raises(TransportError, match="2 failures within a minute"):
                await fetching
            with pytest.raises(TransportError):
                await peer.publish("x", b"")

    run(scenario())


def test_strangers_leave_room_for_whom_a_peer_dials_itself(tmp_path: Path) -> None:
    """Identities cost nothing: whoever takes all places would cut a peer off from its swarm."""

    async def scenario() -> None:
        async with swarm(tmp_path, 6, max_connections=4) as (host, friend, *strangers):
            await asyncio.gather(*(stranger.connect(host.addrs) for stranger in strangers), return_exceptions=True)
            await until(lambda: len(host.connected_peers()) >= 3, "as many strangers as get in")
            await host.connect(friend.addrs)
            await until(lambda: friend.peer_id in host.connected_peers(), "the friend")

    run(scenario())


def test_connections_that_have_ended_take_no_places(tmp_path: Path) -> None:
    """A peer lives for weeks, and others come and go."""

    async def scenario() -> None:
        async with swarm(tmp_path, 2, max_connections=3) as (host, visitor):
            for _ in range(8):
                await visitor.connect(host.addrs)
                await until(lambda: host.connected_peers() == {visitor.peer_id}, "the visitor")
                await visitor.disconnect(host.peer_id)
                await until(lambda: not host.connected_peers(), "the visitor to leave")

    run(scenario())
