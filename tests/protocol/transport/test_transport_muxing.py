"""Peers that send more than sockets or windows hold, or nobody reads, and what py-libp2p makes of it.

The muxers run in a process of their own: py-libp2p shares none with hivemind.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

STREAMS = 6  # in each direction, that carry data
OPENED = 20  # in each direction, meanwhile
SIZE = 200_000  # bytes a stream, less than its window: nobody waits for credit
PINGS = 5_000
WINDOW = 256 * 1024
BEYOND = 4 * WINDOW  # that a hostile peer sends on one stream
LEFT, LEFT_SIZE = 40, 10_000  # streams that are reset with unread bytes, and how many
HALF_OPEN = 1100


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_py_libp2p_jams(found: dict[str, Any]) -> None:
    assert found["bare"]["jammed"], "else Muxer may go"


def test_both_directions_are_full_and_streams_open(found: dict[str, Any]) -> None:
    assert found["ours"] == {"jammed": False, "received": 2 * STREAMS * SIZE, "accepted": 2 * (STREAMS + OPENED)}


def test_who_reads_no_answers_is_not_read(found: dict[str, Any]) -> None:
    assert found["flood"]["unanswered"] <= 1024
    assert found["flood"]["sent at first"] < PINGS
    assert found["flood"]["answers"] == list(range(PINGS)), "all of them, in order, once they are read"
    assert found["flood"]["ended with the connection"]


def test_py_libp2p_holds_what_is_beyond_the_window(found: dict[str, Any]) -> None:
    assert found["bare beyond"]["held"] == BEYOND, "else `_Unread` may go"


def test_who_sends_beyond_the_window_loses_the_connection(found: dict[str, Any]) -> None:
    assert found["beyond"]["most held"] <= WINDOW
    assert found["beyond"]["ended"]
    assert found["beyond"]["held"] == 0


def test_py_libp2p_keeps_what_came_on_streams_that_are_over(found: dict[str, Any]) -> None:
    assert found["bare left"]["reset there"] > 0
    assert found["bare left"]["reset here"] == LEFT * LEFT_SIZE
    assert found["bare left"]["closed here"] == LEFT * LEFT_SIZE, "else `_finalize_stream` may go"


def test_what_nobody_will_read_is_not_kept(found: dict[str, Any]) -> None:
    assert found["left"] == {"reset there": 0, "reset here": 0, "closed here": 0, "read": LEFT_SIZE}


def test_streams_that_the_peer_never_closes_are_not_kept_for_ever(found: dict[str, Any]) -> None:
    assert found["half open"] == {"kept": 1024, "reset": HALF_OPEN - 1024}


# --- with py-libp2p ---------------------------------------------------------------------------------------------------


class Wire:
    """What a muxer uses of a secured connection, over a socket that holds little."""

    def __init__(self, end: Any, is_initiator: bool) -> None:
        import trio

        self._stream = trio.SocketStream(end)
        self.is_initiator = is_initiator

    async def read(self, most: int) -> bytes:
        return await self._stream.receive_some(most)

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


def wires(holding: int = 4096) -> tuple[Wire, Wire]:
    import socket

    import trio

    near, far = trio.socket.socketpair()
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, holding)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, holding)
    return Wire(near, True), Wire(far, False)


async def _both_full(muxer: Any) -> dict[str, Any]:
    import trio

    peer = _peer()
    result = {"jammed": True, "received": 0, "accepted": 0}

    whole = trio.Event()

    def count(what: str, more: int) -> None:
        result[what] += more
        if result["received"] == 2 * STREAMS * SIZE and result["accepted"] == 2 * (STREAMS + OPENED):
            whole.set()

    async def accept(end: Any) -> None:
        while True:
            nursery.start_soon(read, await end.accept_stream())
            count("accepted", 1)

    async def read(stream: Any) -> None:
        while True:
            data = await stream.read(65_536)
            count("received", len(data))

    async def send(end: Any) -> None:
        await (await end.open_stream()).write(os.urandom(SIZE))

    async def open_some(end: Any) -> None:
        for _ in range(OPENED):
            await end.open_stream()

    async with trio.open_nursery() as nursery:
        ends = [muxer(wire, peer) for wire in wires()]
        for end in ends:
            nursery.start_soon(end.start)
            nursery.start_soon(accept, end)
        with trio.move_on_after(5):
            async with trio.open_nursery() as sending:
                for end in ends:
                    sending.start_soon(open_some, end)
                    for _ in range(STREAMS):
                        sending.start_soon(send, end)
            await whole.wait()
            result["jammed"] = False
        nursery.cancel_scope.cancel()
    return result


async def _flood() -> dict[str, Any]:
    import struct

    import trio
    from shoal.protocol.transport.muxing import Muxer

    result: dict[str, Any] = {"answers": [], "sent at first": 0, "unanswered": 0}
    hostile, wire = wires()
    muxer = Muxer(wire, _peer())
    sent = 0

    async def ping() -> None:
        nonlocal sent
        for sent in range(PINGS):
            await hostile.write(struct.pack("!BBHII", 0, 2, 1, 0, sent))

    async def start() -> None:
        await muxer.start()
        result["ended with the connection"] = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        nursery.start_soon(ping)
        await trio.sleep(0.3)  # before the muxer's own ping
        result["sent at first"], result["unanswered"] = sent, muxer._to_answer.statistics().current_buffer_used
        data = b""
        while len(result["answers"]) < PINGS:
            data += await hostile.read(4096)
            for start_of in range(0, len(data) - 11, 12):
                _, kind, flags, _, value = struct.unpack_from("!BBHII", data, start_of)
                if (kind, flags) == (2, 2):
                    result["answers"].append(value)
            data = data[len(data) // 12 * 12 :]
        await hostile.close()
    return result


def _peer() -> Any:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    return ID.from_pubkey(create_new_key_pair().public_key)


def _frame(kind: int, flags: int, stream: int, value: int, body: bytes = b"") -> bytes:
    import struct

    return struct.pack("!BBHII", 0, kind, flags, stream, value) + body


SYN, FIN, RST = 1, 4, 8


@asynccontextmanager
async def _hostile(muxer: Any) -> AsyncIterator[tuple[Any, Wire, Any]]:
    """A muxer, the wire to it, and the event of its end."""
    import trio

    hostile, wire = wires(holding=1 << 20)
    end, ended = muxer(wire, _peer()), trio.Event()

    async def start() -> None:
        await end.start()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        await end.event_started.wait()
        yield end, hostile, ended
        nursery.cancel_scope.cancel()


async def _settled(hostile: Wire) -> bytes:
    """All that was sent has been taken in: a ping behind it is answered. Returns what was said up to that."""
    await hostile.write(_frame(2, 1, 0, 77))
    data = b""
    while _frame(2, 2, 0, 77) not in data and (part := await hostile.read(65_536)):
        data += part
    return data


def _held(end: Any) -> int:
    return sum(len(buffer) for buffer in end.stream_buffers.values())


async def _beyond(muxer: Any) -> dict[str, Any]:
    """One stream that nobody reads, and a peer that goes on sending."""
    import trio

    most = 0
    async with _hostile(muxer) as (end, hostile, ended):
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await hostile.write(_frame(1, SYN, 2, 0))
            for _ in range(BEYOND // 16_384):
                await hostile.write(_frame(0, 0, 2, 16_384, bytes(16_384)))
                most = max(most, _held(end))
            await _settled(hostile)
        with trio.move_on_after(1):
            await ended.wait()
        return {"most held": most, "held": _held(end), "ended": ended.is_set()}


async def _left(muxer: Any) -> dict[str, Any]:
    """Bytes that are held of streams which are over, by who ended them."""
    result: dict[str, Any] = {}
    for how in ("reset there", "reset here", "closed here"):
        async with _hostile(muxer) as (end, hostile, _):
            ids = range(2, 2 + 2 * LEFT, 2)
            for id in ids:
                await hostile.write(_frame(1, SYN, id, 0) + _frame(0, 0, id, LEFT_SIZE // 2, bytes(LEFT_SIZE // 2)))
            streams = [await end.accept_stream() for _ in ids]
            if how == "reset here":
                for stream in streams:
                    await stream.reset()
            elif how == "closed here":
                for stream in streams:
                    await stream.close()
            for id in ids:
                await hostile.write(_frame(0, 0, id, LEFT_SIZE // 2, bytes(LEFT_SIZE // 2)))
                if how == "reset there":
                    await hostile.write(_frame(1, RST, id, 0))
            await _settled(hostile)
            result[how] = _held(end)
    async with _hostile(muxer) as (end, hostile, _):  # a peer that has said all is still heard to the end
        await hostile.write(_frame(1, SYN, 2, 0) + _frame(0, FIN, 2, LEFT_SIZE, bytes(LEFT_SIZE)))
        stream = await end.accept_stream()
        await _settled(hostile)
        result["read"] = len(await stream.read(LEFT_SIZE + 1))
    return result


async def _half_open(muxer: Any) -> dict[str, Any]:
    """Streams that are closed here, and of whose other half nothing is heard any more."""
    async with _hostile(muxer) as (end, hostile, _):
        for id in range(2, 2 + 2 * HALF_OPEN, 2):
            await hostile.write(_frame(1, SYN, id, 0))
            await (await end.accept_stream()).close()
        data = await _settled(hostile)
        frames = [data[i : i + 12] for i in range(0, len(data), 12)]
        resets = [frame for frame in frames if frame[:4] == bytes((0, 1, 0, RST))]
        return {"kept": len(end.streams), "reset": len(resets)}


async def _main() -> None:
    from libp2p.stream_muxer.yamux.yamux import Yamux
    from shoal.protocol.transport.muxing import Muxer

    result = {"bare": await _both_full(Yamux), "ours": await _both_full(Muxer), "flood": await _flood()}
    for name, muxer in (("bare ", Yamux), ("", Muxer)):
        result[name + "beyond"] = await _beyond(muxer)
        result[name + "left"] = await _left(muxer)
    result["half open"] = await _half_open(Muxer)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import trio

    trio.run(_main)
