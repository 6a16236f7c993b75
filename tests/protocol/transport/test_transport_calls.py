"""Calls with a body between real py-libp2p hosts in real processes, on loopback."""

import asyncio
import hashlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path

import pytest
from shoal.protocol.errors import PeerUnreachable, Refused, TransportError
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.limits import Limits
from transports import run, swarm, until


async def echo(_peer_id: str, name: str, body: bytes) -> bytes:
    return name.encode() + hashlib.sha256(body).digest()


def echoed(name: str, body: bytes) -> bytes:
    return name.encode() + hashlib.sha256(body).digest()


async def reason(call: Awaitable[bytes]) -> str:
    """Why the call is refused."""
    with pytest.raises(Refused) as caught:
        await call
    return caught.value.reason


def test_bodies_of_any_size_arrive_and_replies_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (answerer, caller):
            callers = set()

            async def answer(peer_id: str, name: str, body: bytes) -> bytes:
                callers.add(peer_id)
                return b"" if name == "empty reply" else body[:65_536] if name == "large reply" else echoed(name, body)

            answerer.answer_calls(answer)
            for size in (0, 1, random.randrange(2, 10**6), 262_144, 1_000_000, 20_000_000):
                body, began = os.urandom(size), time.monotonic()
                reply = await caller.call(answerer.addrs, "sketch", body, deadline_seconds=30)
                assert reply == echoed("sketch", body), f"{size} bytes"
                print(f"\ncall with {size} bytes: {time.monotonic() - began:.3f} s")
            assert await caller.call(answerer.addrs, "empty reply", b"x", deadline_seconds=10) == b""
            body = os.urandom(70_000)
            assert await caller.call(answerer.addrs, "large reply", body, deadline_seconds=10) == body[:65_536]
            assert callers == {caller.peer_id}
            await until(lambda: answerer.counters.call_bytes_received > 21_000_000, "the answerer's counter")
            await until(lambda: caller.counters.call_bytes_sent > 21_000_000, "the caller's counter")
            assert answerer.counters.calls_cut == answerer.counters.garbage == 0

    run(scenario())


def test_calls_in_both_directions_at_once_keep_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2, max_received_calls_per_peer=8) as peers:
            for peer in peers:
                peer.answer_calls(echo)

            async def one(source: Transport, target: Transport, name: str) -> None:
                body = os.urandom(random.randrange(400_000))
                assert await source.call(target.addrs, name, body, deadline_seconds=30) == echoed(name, body)

            await asyncio.gather(*(one(*pair, f"call {i}") for i in range(8) for pair in (peers, peers[::-1])))

    run(scenario())


def test_large_calls_in_both_directions_while_streams_open(tmp_path: Path) -> None:
    async def answer(_peer_id: str, _name: str, body: bytes) -> bytes:
        return str(len(body)).encode()

    async def scenario() -> None:
        async with swarm(tmp_path, 2, max_received_calls_per_peer=16, max_received_call_bytes=10**9) as peers:
            body = os.urandom(4_000_000)

            async def large(source: Transport, target: Transport) -> None:
                for _ in range(5):
                    assert await source.call(target.addrs, "large", body, deadline_seconds=50) == b"4000000"

            async def small(source: Transport, target: Transport) -> None:
                for _ in range(40):  # a call without a body opens a stream
                    assert await source.call(target.addrs, "small", b"", deadline_seconds=50) == b"0"

            for peer in peers:
                peer.answer_calls(answer)
            pairs = (peers, peers[::-1])
            await asyncio.gather(*(large(*pair) for pair in pairs for _ in range(8)), *(small(*pair) for pair in pairs))

    run(scenario())


def test_every_refusal_has_its_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2, max_call_bytes=100_000, answer_deadline_seconds=1.0) as (answerer, caller):

            def call(name: str, body: bytes = b"body") -> Awaitable[bytes]:
                return caller.call(answerer.addrs, name, body, deadline_seconds=20)

            assert await reason(call("no handler")) == "no-handler"
            gate, handled = asyncio.Event(), list[str]()

            async def answer(_peer_id: str, name: str, body: bytes) -> bytes:
                handled.append(name)
                match name:
                    case "own reason":
                        raise Refused("stale-epoch", "too old")
                    case "bad reason":
                        raise Refused("Not a reason\n", "x")
                    case "bug":
                        raise KeyError("bug")
                    case "cancelled":
                        raise asyncio.CancelledError
                    case "reply too long":
                        return bytes(65_537)
                    case "slow":
                        await gate.wait()
                return body

            def admit(peer_id: str, name: str, size: int) -> None:
                assert peer_id == caller.peer_id
                if name == "stranger":
                    raise Refused("not-a-member", f"{size} bytes of a stranger")
                if name == "bug at the door":
                    raise KeyError("bug")

            answerer.answer_calls(answer, admit=admit)
            assert await reason(call("own reason")) == "stale-epoch"
            for name in ("bad reason", "bug", "cancelled", "reply too long", "bug at the door"):
                assert await reason(call(name)) == "failed", name
            before = answerer.counters.call_bytes_received
            assert await reason(call("stranger", bytes(100_000))) == "not-a-member"
            assert "stranger" not in handled
            assert await call("fine", bytes(70_000)[:65_536]) == bytes(65_536)  # the connection has taken no harm
            await until(lambda: answerer.counters.call_bytes_received > before + 65_536, "the counter")
            assert answerer.counters.call_bytes_received < before + 100_000, "a refused body was read"
            assert await reason(call("slow")) == "busy"
            gate.set()

    run(scenario())


def test_bodies_and_names_out_of_bounds(tmp_path: Path) -> None:
    few = Limits(max_call_bytes=1000)

    async def scenario() -> None:
        async with (
            await Transport.start(identity_path=tmp_path / "a", run_id="run", limits=few) as small,
            await Transport.start(identity_path=tmp_path / "b", run_id="run") as large,
            await Transport.start(identity_path=tmp_path / "c", run_id="other") as foreign,
        ):
            for peer in (small, large, foreign):
                peer.answer_calls(echo)
            with pytest.raises(ValueError, match="1000"):
                await small.call(large.addrs, "x", bytes(1001), deadline_seconds=10)
            for name in ("", "x" * 129):
                with pytest.raises(ValueError, match="characters"):
                    await small.call(large.addrs, name, b"", deadline_seconds=10)
            assert await reason(large.call(small.addrs, "x", os.urandom(5_000_000), deadline_seconds=10)) == "too-large"
            assert await reason(large.call(foreign.addrs, "x", b"", deadline_seconds=10)) == "no-handler"
            assert await large.call(small.addrs, "x", bytes(1000), deadline_seconds=10) == echoed("x", bytes(1000))
            await until(lambda: small.counters.call_bytes_received >= 1000, "the counter")
            assert small.counters.call_bytes_received < 5000, "a refused body was read"

    run(scenario())


def test_nobody_answers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (answerer, caller):
            never, cancelled = asyncio.Event(), asyncio.Event()

            async def answer(_peer_id: str, name: str, _body: bytes) -> bytes:
                cancelled.set()
                if name == "never":
                    await never.wait()
                return b"reply"

            answerer.answer_calls(answer)
            began = time.monotonic()
            with pytest.raises(PeerUnreachable, match=r"no answer after 0\.5 s"):
                await caller.call(answerer.addrs, "never", bytes(1000), deadline_seconds=0.5)
            assert time.monotonic() - began < 3
            cancelled.clear()
            leaving = asyncio.create_task(caller.call(answerer.addrs, "never", bytes(1000), deadline_seconds=20))
            await cancelled.wait()
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            never.set()  # the places of both come back
            assert await caller.call(answerer.addrs, "x", b"", deadline_seconds=10) == b"reply"
            assert await reason(caller.call(["nonsense"], "x", b"", deadline_seconds=10)) == "garbage"
            addrs = answerer.addrs
            await answerer.close()
            with pytest.raises(PeerUnreachable):
                await caller.call(addrs, "x", b"", deadline_seconds=20)

    run(scenario())


def test_more_calls_than_allowed_are_told_busy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 3, max_received_calls=3, max_received_calls_per_peer=2) as (answerer, one, two):
            gate, inside = asyncio.Event(), Counter[str]()

            async def answer(peer_id: str, _name: str, _body: bytes) -> bytes:
                inside[peer_id] += 1
                await gate.wait()
                return b"reply"

            answerer.answer_calls(answer)

            def call(peer: Transport, seconds: float = 20) -> asyncio.Task[bytes]:
                return asyncio.create_task(peer.call(answerer.addrs, "x", b"body", deadline_seconds=seconds))

            admitted = [call(one), call(one)]
            await until(lambda: inside[one.peer_id] == 2, "two calls")
            assert await reason(call(one)) == "busy"  # over the peer's own limit
            with pytest.raises(PeerUnreachable):
                await call(two, 1)  # has left, but the handler is still at it: its place stays taken
            await until(lambda: inside[two.peer_id] == 1, "the third call")
            assert await reason(call(two)) == "busy"  # over the total
            gate.set()
            assert await asyncio.gather(*admitted) == [b"reply"] * 2
            assert await asyncio.gather(call(two), call(two), call(one)) == [b"reply"] * 3  # places come back
            await until(lambda: answerer.counters.refused_busy == 2, "the counter")

    run(scenario())


def test_bodies_beyond_the_reserved_memory_are_told_busy(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = {"max_call_bytes": 100_000, "max_received_call_bytes": 150_000, "max_received_calls_per_peer": 9}
        async with swarm(tmp_path, 3, **limits) as (answerer, one, two):
            gate, inside = asyncio.Event(), list[str]()

            async def answer(_peer_id: str, name: str, _body: bytes) -> bytes:
                inside.append(name)
                await gate.wait()
                return b"reply"

            answerer.answer_calls(answer)

            def call(peer: Transport, size: int) -> asyncio.Task[bytes]:
                return asyncio.create_task(peer.call(answerer.addrs, f"{size}", bytes(size), deadline_seconds=20))

            admitted = [call(one, 90_000)]
            await until(lambda: len(inside) == 1, "the first body")
            assert await reason(call(one, 10_001)) == "busy"  # one peer's share
            admitted.append(call(one, 10_000))
            await until(lambda: len(inside) == 2, "the second body")
            assert await reason(call(two, 50_001)) == "busy"  # the total
            admitted.append(call(two, 50_000))
            await until(lambda: len(inside) == 3, "the third body")
            gate.set()
            assert await asyncio.gather(*admitted) == [b"reply"] * 3
            assert await call(one, 100_000) == b"reply"  # all of it is free again

    run(scenario())


@pytest.mark.parametrize("victim", ["answerer", "caller"])
@pytest.mark.parametrize("moment", ["body", "handler"])
def test_a_host_that_dies_during_a_call_fails_it_and_nothing_else(tmp_path: Path, victim: str, moment: str) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (answerer, caller):
            target = answerer if victim == "answerer" else caller
            inside, gate, bodies = asyncio.Event(), asyncio.Event(), list[int]()

            async def answer(_peer_id: str, _name: str, body: bytes) -> bytes:
                bodies.append(len(body))
                inside.set()
                await gate.wait()
                return b"reply"

            def admit(*_: object) -> None:
                if moment == "body" and not inside.is_set():
                    inside.set()

            answerer.answer_calls(answer, admit=admit)
            call = asyncio.create_task(
                caller.call(
                    answerer.addrs, "x", os.urandom(60_000_000 if moment == "body" else 10), deadline_seconds=30
                )
            )
            await inside.wait()
            os.kill(target.host_pid or 0, signal.SIGKILL)
            with pytest.raises(PeerUnreachable):
                await call
            assert bodies == ([] if moment == "body" else [10]), "half a body was handled"
            gate.set()
            await until(lambda: target.restarts == 1, "the restart")
            assert await caller.call(answerer.addrs, "x", b"again", deadline_seconds=20) == b"reply"

    run(scenario())


def test_closing_ends_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (answerer, caller):
            inside, never = asyncio.Event(), asyncio.Event()

            async def answer(*_: object) -> bytes:
                inside.set()
                await never.wait()
                return b""

            answerer.answer_calls(answer)
            call = asyncio.create_task(caller.call(answerer.addrs, "x", b"", deadline_seconds=30))
            await inside.wait()
            await caller.close()
            with pytest.raises(TransportError):
                await call
            with pytest.raises(TransportError):
                await caller.call(answerer.addrs, "x", b"", deadline_seconds=30)

    run(scenario())
