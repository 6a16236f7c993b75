"""What hostile peers can do with calls: cost their own stream, nothing else. Also the format, without processes.

The hostile peer is py-libp2p in a process of its own (it cannot share one with hivemind), run from this file.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.errors import PeerUnreachable, Refused
from shoal.protocol.transport import call_wire
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.limits import Limits

PATIENCE_SECONDS = 20.0
BODY = bytes(range(256)) * 2000  # 512 kB

ATTACKS = ["garbage", "oversized frame", "truncated", "cut", "drip", "stall", "digest", "huge", "unasked", "many"]


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        await asyncio.sleep(0.01)


async def start(directory: Path, name: str) -> Transport:
    limits = Limits(read_deadline_seconds=1.0, max_call_bytes=1_000_000, max_received_call_bytes=2_000_000)
    return await Transport.start(identity_path=directory / f"{name}.key", run_id="run", limits=limits)


def test_an_attack_costs_its_own_stream_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        answerer, friend = await asyncio.gather(start(tmp_path, "answerer"), start(tmp_path, "friend"))
        attacker = await asyncio.create_subprocess_exec(
            sys.executable, "-P", __file__, answerer.addrs[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        handled: list[tuple[str, bytes]] = []

        async def answer(peer_id: str, _name: str, body: bytes) -> bytes:
            handled.append((peer_id, body))
            return hashlib.sha256(body).digest()

        answerer.answer_calls(answer)
        try:
            for kind in ATTACKS:
                before = answerer.counters
                attacker.stdin.write(kind.encode() + b"\n")
                result = json.loads(await asyncio.wait_for(attacker.stdout.readline(), PATIENCE_SECONDS))
                print(f"\n{kind}: {result}")
                match kind:
                    case "garbage" | "oversized frame":
                        assert result["ended"]
                        await until(lambda b=before: answerer.counters.garbage > b.garbage, "the garbage to be counted")
                    case "truncated" | "cut" | "drip" | "stall":
                        assert result["ended"], f"{kind}: the stream was not cut"
                        await until(lambda b=before: answerer.counters.calls_cut > b.calls_cut, f"{kind} to be counted")
                    case "digest":
                        assert "digest" in result["answer"]
                        await until(lambda b=before: answerer.counters.garbage > b.garbage, "the digest to be counted")
                    case "huge":
                        assert "too-large" in result["answer"]
                    case "many":
                        assert result["busy"] >= result["opened"] / 2
                assert not [body for peer_id, body in handled if peer_id != friend.peer_id], f"{kind} was handled"
                reply = await friend.call(answerer.addrs, "x", BODY, deadline_seconds=10)
                assert reply == hashlib.sha256(BODY).digest(), kind
            assert answerer.restarts == 0
            assert answerer.addrs
        finally:
            attacker.kill()
            await attacker.communicate()
            await asyncio.gather(answerer.close(), friend.close())

    asyncio.run(asyncio.wait_for(scenario(), 100))


LIES = {
    "garbage": "garbage",
    "garbage after the body": "garbage",
    "reply without a body": "garbage",
    "go twice": "garbage",
    "reply too long": "garbage",
    "bad reason": "garbage",
    "unreachable": "unreachable",  # its own words, not ours
    "hang up": None,
    "hang up after the body": None,
    "hang up inside the body": None,
    "silence": None,
}


def test_a_lying_answerer_is_found_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        caller = await start(tmp_path, "caller")
        liar = await asyncio.create_subprocess_exec(
            sys.executable, "-P", __file__, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert liar.stdout is not None
            addr = (await liar.stdout.readline()).decode().strip()
            for lie, reason in LIES.items():
                with pytest.raises((Refused, PeerUnreachable)) as caught:
                    await caller.call([addr], lie, BODY, deadline_seconds=5)
                assert getattr(caught.value, "reason", None) == reason, f"{lie}: {caught.value}"
            assert await caller.call([addr], "truth", BODY, deadline_seconds=5) == b"truth"
            assert caller.restarts == 0
        finally:
            liar.kill()
            await liar.communicate()
            await caller.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_peer_without_the_protocol_says_so_and_stays_connected(tmp_path: Path) -> None:
    async def scenario() -> None:
        caller = await start(tmp_path, "caller")
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-P", __file__, "", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert other.stdout is not None
            addr = (await other.stdout.readline()).decode().strip()
            await caller.connect([addr])
            for _ in range(2):
                with pytest.raises(Refused) as caught:
                    await caller.call([addr], "x", b"", deadline_seconds=10)
                assert caught.value.reason == "unknown-protocol"
            assert len(caller.connected_peers()) == 1
        finally:
            other.kill()
            await other.communicate()
            await caller.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


# --- the format -------------------------------------------------------------------------------------------------------

OPENING = call_wire.Opening("run", "x", len(BODY), hashlib.sha256(BODY).digest())

GOLDEN = [
    (call_wire.Opening("run", "sketch", 300, bytes(32)), "0000003194a372756ea6736b65746368cd012cc420" + "00" * 32),
    (call_wire.Go(), "0000000391a167"),
    (call_wire.Reply(b"ok"), "0000000792a161c4026f6b"),
    (call_wire.Refusal(call_wire.CallReason.BUSY), "0000000892a172a462757379"),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN)
def test_golden_bytes(message: Any, golden: str) -> None:
    assert call_wire.pack(message).hex() == golden
    body = bytes.fromhex(golden)[4:]
    unpacks = [call_wire.unpack_opening, call_wire.unpack_permission, call_wire.unpack_outcome]
    found = []
    for unpack in unpacks:
        with contextlib.suppress(ValueError):
            found.append(unpack(body))
    assert found == [message] * (2 if isinstance(message, call_wire.Refusal) else 1)


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode(["run", "", 0, bytes(32)]),
        msgspec.msgpack.encode(["run", "x" * 129, 0, bytes(32)]),
        msgspec.msgpack.encode(["run", "x", -1, bytes(32)]),
        msgspec.msgpack.encode(["run", "x", 2**60, bytes(32)]),
        msgspec.msgpack.encode(["run", "x", 0, bytes(31)]),
        msgspec.msgpack.encode(["run", "x", 0, bytes(33)]),
        msgspec.msgpack.encode(["run", "x", 0, bytes(32), "more"]),
        msgspec.msgpack.encode(["r", "Because"]),
        msgspec.msgpack.encode(["r", "busy\n"]),
        msgspec.msgpack.encode(["r", ""]),
        msgspec.msgpack.encode(["r", "x" * 65]),
        b"",
    ],
)
def test_out_of_bounds_is_refused(body: bytes) -> None:
    for unpack in (call_wire.unpack_opening, call_wire.unpack_permission, call_wire.unpack_outcome):
        with pytest.raises(msgspec.MsgspecError):
            unpack(body)


@given(st.binary(max_size=300))
def test_garbage_is_a_value_error(body: bytes) -> None:
    for unpack in (call_wire.unpack_opening, call_wire.unpack_permission, call_wire.unpack_outcome):
        with contextlib.suppress(ValueError):
            unpack(body)


def test_the_overhead_of_a_reply_is_bounded() -> None:
    for size in (0, 255, 256, 65_536, 1_000_000):
        assert len(call_wire.pack(call_wire.Reply(bytes(size)))) - 4 - size <= call_wire.REPLY_OVERHEAD_BYTES


# --- the hostile peer -------------------------------------------------------------------------------------------------


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


async def hostile(addr: str) -> None:
    """Carries out the attacks named on standard input, one per line; a JSON line answers each."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = new_host(muxer_preference="YAMUX")
    info = info_from_p2p_addr(Multiaddr(addr))

    async def opened(opening: call_wire.Opening | None = None) -> Any:
        stream = await host.new_stream(info.peer_id, [TProtocol(call_wire.PROTOCOL)])
        if opening is not None:
            await stream.write(call_wire.pack(opening))
        return stream

    async def permitted() -> Any:
        stream = await opened(OPENING)
        assert await stream.read(100) == call_wire.pack(call_wire.Go())
        return stream

    async def ended(stream: Any) -> dict[str, bool]:
        """Whether the victim ends the stream soon."""
        with trio.move_on_after(8):
            try:
                while await stream.read(65536):
                    pass
            except (BaseLibp2pError, EOFError):
                pass
            return {"ended": True}
        return {"ended": False}

    async def drip(stream: Any) -> dict[str, bool]:
        """A body that makes progress all the time, but would hold its memory for days."""
        with trio.move_on_after(15):
            while True:
                try:
                    await stream.write(b"x")
                except BaseLibp2pError:
                    return {"ended": True}
                await trio.sleep(0.2)
        return {"ended": False}

    async def many() -> dict[str, int]:
        streams = [await opened(OPENING) for _ in range(30)]
        answers: list[bytes] = []
        for stream in streams:
            with trio.move_on_after(0.2), contextlib.suppress(BaseLibp2pError):
                answers.append(await stream.read(100))
        for stream in streams:
            await stream.reset()
        return {"opened": len(streams), "busy": sum(b"busy" in answer for answer in answers)}

    async def attack(kind: str) -> dict[str, Any]:
        match kind:
            case "garbage":
                stream = await opened()
                await stream.write(frame(os.urandom(200)))
            case "oversized frame":
                stream = await opened()
                await stream.write(struct.pack(">I", 2**31) + bytes(100_000))
            case "truncated":
                stream = await opened()
                await stream.write(call_wire.pack(OPENING)[:-3])
                await stream.close()
            case "cut":
                stream = await permitted()
                await stream.write(BODY[: random.randrange(len(BODY))])
                await stream.close()
            case "stall":
                stream = await permitted()
                await stream.write(BODY[:-1])
            case "drip":
                return await drip(await permitted())
            case "digest":
                stream = await permitted()
                await stream.write(BODY[:-1] + b"?")
                return {"answer": repr(await stream.read(100))}
            case "huge":
                stream = await opened(call_wire.Opening("run", "x", 2**40, bytes(32)))
                return {"answer": repr(await stream.read(100))}
            case "unasked":  # a body that was refused is sent all the same
                stream = await opened(call_wire.Opening("run", "x", 2**40, bytes(32)))
                with contextlib.suppress(BaseLibp2pError), trio.move_on_after(2):
                    for _ in range(20):
                        await stream.write(BODY)
                await stream.reset()
                return {}
            case "many":
                return await many()
            case _:
                raise AssertionError(kind)
        return await ended(stream)

    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.connect(info)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps(await attack(line.strip())), flush=True)


async def liar(protocol: str) -> None:
    """Answers each call with the lie that it names."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from multiaddr import Multiaddr

    async def read_body(stream: Any, size: int) -> None:
        while size:
            size -= len(await stream.read(size))

    async def answer(stream: Any) -> None:
        opening = call_wire.unpack_opening((await stream.read(1000))[4:])
        go, reply = call_wire.pack(call_wire.Go()), call_wire.pack(call_wire.Reply(b"truth"))
        match opening.name:
            case "garbage":
                await stream.write(frame(os.urandom(100)))
            case "reply without a body":
                await stream.write(reply)
            case "bad reason":
                await stream.write(frame(msgspec.msgpack.encode(["r", "shoal{} 1\n"])))
            case "unreachable":
                await stream.write(call_wire.pack(call_wire.Refusal("unreachable")))
            case "hang up":
                pass
            case "silence":
                await trio.sleep_forever()
            case "hang up inside the body":
                await stream.write(go)
                await stream.read(1000)
                await stream.reset()
                return
            case after:
                await stream.write(go)
                await read_body(stream, opening.size)
                match after:
                    case "garbage after the body":
                        await stream.write(frame(os.urandom(100)))
                    case "go twice":
                        await stream.write(go)
                    case "reply too long":
                        await stream.write(call_wire.pack(call_wire.Reply(bytes(100_000))))
                    case "truth":
                        await stream.write(reply)
        await stream.close()

    host = new_host(muxer_preference="YAMUX")
    host.set_stream_handler(TProtocol(protocol), answer)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    import trio

    if len(sys.argv) > 1 and sys.argv[1]:
        trio.run(hostile, sys.argv[1])
    else:
        trio.run(liar, call_wire.PROTOCOL if len(sys.argv) == 1 else "/shoal/other/1")
