"""Two peers that send more to each other than the sockets hold, and what py-libp2p makes of it.

The muxers run in a process of their own: py-libp2p shares none with hivemind.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

STREAMS = 6  # in each direction, that carry data
OPENED = 20  # in each direction, meanwhile
SIZE = 200_000  # bytes a stream, less than its window: nobody waits for credit
PINGS = 5_000


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


def wires() -> tuple[Wire, Wire]:
    import socket

    import trio

    near, far = trio.socket.socketpair()
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return Wire(near, True), Wire(far, False)


async def _both_full(muxer: Any) -> dict[str, Any]:
    import trio
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    peer = ID.from_pubkey(create_new_key_pair().public_key)
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
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID
    from shoal.protocol.transport.muxing import Muxer

    result: dict[str, Any] = {"answers": [], "sent at first": 0, "unanswered": 0}
    hostile, wire = wires()
    muxer = Muxer(wire, ID.from_pubkey(create_new_key_pair().public_key))
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


async def _main() -> None:
    from libp2p.stream_muxer.yamux.yamux import Yamux
    from shoal.protocol.transport.muxing import Muxer

    result = {"bare": await _both_full(Yamux), "ours": await _both_full(Muxer), "flood": await _flood()}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import trio

    trio.run(_main)
