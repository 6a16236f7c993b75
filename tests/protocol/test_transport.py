"""The data plane with real py-libp2p hosts in real processes, on loopback."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from shoal.protocol.errors import PeerUnreachable, Refused, TransportError
from shoal.protocol.identity import Identity
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.downloads import Download, FetchEnded, FetchQuery, Resource
from shoal.protocol.transport.limits import MAX_PUBLISH_BYTES, Limits
from shoal.protocol.transport.wire import Reason

PATIENCE_SECONDS = 20.0


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def until(condition: Callable[[], object], what: str = "", seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what or condition}"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def swarm(directory: Path, count: int, **limits: Any) -> AsyncIterator[list[Transport]]:
    """`count` transports, not connected."""
    peers = await asyncio.gather(
        *(
            Transport.start(identity_path=directory / f"{i}.key", run_id="run", limits=Limits(**limits))
            for i in range(count)
        )
    )
    try:
        yield peers
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))


class Listener:
    """Collects what a topic brings."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, sender: str, data: bytes) -> None:
        self.messages.append((sender, data))


async def gossiping(peers: list[Transport], topic: str) -> list[Listener]:
    """Connect everybody to the first, subscribe all, and wait until a message of each reaches all others."""
    listeners = [Listener() for _ in peers]
    for peer, listener in zip(peers, listeners, strict=True):
        await peer.subscribe(topic, listener)
    for peer in peers[1:]:
        await peer.connect(peers[0].addrs)
    await reached(peers, listeners, topic)
    return listeners


async def reached(peers: list[Transport], listeners: list[Listener], topic: str) -> None:
    everybody = {peer.peer_id for peer in peers}
    for listener in listeners:
        listener.messages.clear()

    def missing() -> bool:
        return any(
            {sender for sender, _ in listener.messages} != everybody - {peer.peer_id}
            for peer, listener in zip(peers, listeners, strict=True)
        )

    deadline = time.monotonic() + PATIENCE_SECONDS
    while missing():
        assert time.monotonic() < deadline, "the mesh does not form"
        for peer in peers:
            await peer.publish(topic, b"hello")
        with contextlib.suppress(AssertionError):
            await until(lambda: not missing(), seconds=0.3)
    for listener in listeners:
        listener.messages.clear()


def serve(peer: Transport, **resources: Resource) -> Counter[str]:
    asked: Counter[str] = Counter()

    async def answer(query: FetchQuery) -> Resource | None:
        asked[query.peer_id] += 1
        return resources.get(query.resource)

    peer.serve(answer)
    return asked


# --- gossip -----------------------------------------------------------------------------------------------------------


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


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_fetch_20_megabytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):
            resource = Resource(os.urandom(20_000_000), b"step 7")
            serve(server, snapshot=resource, empty=Resource(b"", b"nothing"))
            seen: list[tuple[int, int]] = []
            began = time.monotonic()
            got = await asker.fetch(
                server.addrs, "snapshot", deadline_seconds=30, max_bytes=20_000_000, progress=lambda *p: seen.append(p)
            )
            print(f"\nfetch: {20 / (time.monotonic() - began):.0f} MB/s")
            assert got.data == resource.data
            assert got.meta == b"step 7"
            assert seen[-1] == (20_000_000, 20_000_000)
            assert [n for n, _ in seen] == sorted(n for n, _ in seen)
            empty = await asker.fetch(server.addrs, "empty", deadline_seconds=5, max_bytes=0)
            assert (empty.data, empty.meta) == (b"", b"nothing")
            await until(lambda: asker.counters.fetch_bytes_received >= 20_000_000, "counter")
            await until(lambda: server.counters.fetch_bytes_sent >= 20_000_000, "counter")

    run(scenario())


@pytest.mark.parametrize("victim", ["server", "asker"])
def test_a_fetch_resumes_after_a_host_is_killed(tmp_path: Path, victim: str) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):
            resource = Resource(os.urandom(20_000_000))
            serve(server, snapshot=resource)
            target = server if victim == "server" else asker
            kill_at = random.randrange(2_000_000, 15_000_000)
            progress: list[int] = []

            def watch(received: int, _size: int) -> None:
                if received >= kill_at and not any(n >= kill_at for n in progress):
                    os.kill(target.host_pid or 0, signal.SIGKILL)
                progress.append(received)

            got = await asker.fetch(server.addrs, "snapshot", deadline_seconds=30, max_bytes=10**8, progress=watch)
            assert got.data == resource.data, f"killed at {kill_at}"
            assert target.restarts == 1
            assert progress == sorted(progress), "started again instead of resuming"
            assert target.host_pid is not None

    run(scenario())


@pytest.mark.parametrize("prefix", ["true", "forged"])
def test_what_one_peer_sent_before_it_left_is_gone_on_with_at_another(tmp_path: Path, prefix: str) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 3) as (leaving, staying, asker):
            resource = Resource(os.urandom(20_000_000))
            serve(leaving, state=resource)
            serve(staying, state=resource)
            begun, leave_at = Download(), random.randrange(2_000_000, 15_000_000)
            leave = asyncio.Event()

            async def go() -> None:
                await leave.wait()
                await leaving.close()

            going = asyncio.create_task(go())
            with pytest.raises(FetchEnded) as ended:
                await asker.fetch(
                    leaving.addrs,
                    "state",
                    deadline_seconds=30,
                    max_bytes=10**8,
                    progress=lambda received, _: leave.set() if received >= leave_at else None,
                    begun=begun,
                )
            await going
            assert ended.value.reason in (Reason.CUT, Reason.UNREACHABLE)
            assert leave_at <= len(begun.data) < len(resource.data), f"left at {leave_at}"
            if prefix == "forged":
                begun.data[leave_at // 2] ^= 1
            seen: list[int] = []
            got = await asker.fetch(
                staying.addrs,
                "state",
                deadline_seconds=30,
                max_bytes=10**8,
                progress=lambda received, _: seen.append(received),
                begun=begun,
            )
            assert got.data == resource.data
            assert seen[0] > leave_at
            assert (seen == sorted(seen)) == (prefix == "true"), "a forged prefix is thrown away, a true one is not"

    run(scenario())


def test_a_resource_that_changes_under_a_fetch_starts_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):
            old, new = Resource(os.urandom(8_000_000)), Resource(os.urandom(5_000_000))
            serve(server, state=old)
            killed = False

            def watch(received: int, _size: int) -> None:
                nonlocal killed
                if received > 1_000_000 and not killed:
                    killed = True
                    serve(server, state=new)
                    os.kill(server.host_pid or 0, signal.SIGKILL)

            got = await asker.fetch(server.addrs, "state", deadline_seconds=30, max_bytes=10**8, progress=watch)
            assert got.data == new.data

    run(scenario())


def test_every_refusal_has_its_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):

            async def fails(resource: str, addrs: list[str] | None = None, seconds: float = 10) -> str:
                began = time.monotonic()
                with pytest.raises(FetchEnded) as caught:
                    await asker.fetch(addrs or server.addrs, resource, deadline_seconds=seconds, max_bytes=1000)
                assert time.monotonic() - began < seconds + 1
                return caught.value.reason

            assert await fails("no handler") == Reason.NOT_FOUND
            never = asyncio.Event()

            async def answer(query: FetchQuery) -> Resource | None:
                assert query.peer_id == asker.peer_id
                match query.resource:
                    case "large":
                        return Resource(bytes(1001))
                    case "slow":
                        await never.wait()
                    case "refused":
                        raise Refused("quota", "too much")
                    case "bug":
                        raise KeyError("bug")
                return None

            server.serve(answer)
            assert await fails("absent") == Reason.NOT_FOUND
            assert await fails("large") == Reason.TOO_LARGE
            assert await fails("refused") == Reason.BUSY
            assert await fails("bug") == Reason.BUSY
            assert await fails("slow", seconds=0.5) == Reason.DEADLINE
            nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{server.peer_id}"
            await server.close()
            assert await fails("absent", [nobody]) == Reason.UNREACHABLE
            assert await fails("absent", ["nonsense"]) == Reason.GARBAGE

    run(scenario())


def test_more_streams_than_allowed_are_told_busy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 3, max_served_streams=3, max_served_streams_per_peer=2) as (server, one, two):
            gate, inside = asyncio.Event(), Counter[str]()

            async def answer(query: FetchQuery) -> Resource | None:
                inside[query.peer_id] += 1
                await gate.wait()
                return Resource(b"data")

            server.serve(answer)

            def fetch(peer: Transport) -> asyncio.Task[Resource]:
                return asyncio.create_task(peer.fetch(server.addrs, "x", deadline_seconds=20, max_bytes=10))

            admitted = [fetch(one), fetch(one)]
            await until(lambda: inside[one.peer_id] == 2)
            with pytest.raises(FetchEnded) as third:
                await fetch(one)  # over the peer's own limit
            assert third.value.reason == Reason.BUSY
            admitted.append(fetch(two))
            await until(lambda: inside[two.peer_id] == 1)
            with pytest.raises(FetchEnded) as fourth:
                await fetch(two)  # over the total
            assert fourth.value.reason == Reason.BUSY
            gate.set()
            assert [got.data for got in await asyncio.gather(*admitted)] == [b"data"] * 3
            assert (await fetch(two)).data == b"data"  # slots come back
            await until(lambda: server.counters.refused_busy == 2, "counter")

    run(scenario())


# --- peers and processes ----------------------------------------------------------------------------------------------


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
