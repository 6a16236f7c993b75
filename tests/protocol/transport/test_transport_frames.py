"""What is done about py-libp2p's cost per frame, and that it is needed.

In a process of its own: py-libp2p shares none with hivemind.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

WINDOW = 256 * 1024
PART, PARTS = 1000, 50  # bytes, and how many times so many


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_py_libp2p_gives_credit_for_every_read(found: dict[str, Any]) -> None:
    assert min(found["bare windows"]) > WINDOW - PART, "else `_give_credit_in_batches` may go"


def test_credit_comes_in_batches(found: dict[str, Any]) -> None:
    windows = found["windows"]
    assert windows[:32] == [WINDOW - PART * (1 + i) for i in range(32)]
    assert windows[32] >= WINDOW, "all that was read"
    assert min(windows) > WINDOW - 33 * PART, "the peer never waits for it"


def test_py_libp2p_takes_locks_with_a_checkpoint(found: dict[str, Any]) -> None:
    assert found["bare lock yields"], "else QuickLock may go"


def test_a_free_lock_is_taken_at_once_and_a_held_one_waited_for(found: dict[str, Any]) -> None:
    assert found["locks are ours"]
    assert not found["lock yields"]
    assert found["inside at once"] == 1


def test_the_socket_is_read_ahead_in_order(found: dict[str, Any]) -> None:
    assert found["left in the socket"] == 0
    assert found["in order"]
    assert found["end"] == ""
    assert found["closed"], "what was read ahead is not given out by a closed stream"


# --- with py-libp2p ---------------------------------------------------------------------------------------------------


async def _windows(wrapped: bool) -> list[int]:
    """The sender's window after each of the parts that the receiver has read one by one."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import PeerInfo
    from multiaddr import Multiaddr
    from shoal.protocol.transport.streams import PeerStream

    anywhere = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    sender, receiver = new_host(muxer_preference="YAMUX"), new_host(muxer_preference="YAMUX")

    async def answer(stream: Any) -> None:
        reader = PeerStream(stream, progress_seconds=10) if wrapped else stream
        await stream.write(b"!")
        for _ in range(PARTS):
            for _ in range(PART // 100):
                assert len(await reader.read(100)) == 100
            await stream.write(b"!")

    receiver.set_stream_handler(TProtocol("/x"), answer)
    async with sender.run(listen_addrs=anywhere), receiver.run(listen_addrs=anywhere):
        await sender.connect(PeerInfo(receiver.get_id(), receiver.get_addrs()))
        stream = await sender.new_stream(receiver.get_id(), [TProtocol("/x")])
        assert await stream.read(1) == b"!"
        stream.muxed_stream.send_window = WINDOW  # whatever the negotiation has left
        windows = []
        for _ in range(PARTS):
            await stream.write(bytes(PART))
            assert await stream.read(1) == b"!"
            windows.append(stream.muxed_stream.send_window)
        await stream.reset()
        await trio.lowlevel.checkpoint()
    return windows


async def _sockets() -> dict[str, Any]:
    import random
    import socket

    import trio
    import trio.testing
    from libp2p.io.trio import TrioTCPStream
    from shoal.protocol.pacing import UNLIMITED
    from shoal.protocol.transport.locks import QuickLock
    from shoal.protocol.transport.sockets import WatchedTCP

    def watched(end: trio.SocketStream) -> Any:
        stream = TrioTCPStream(end)
        WatchedTCP(UNLIMITED)._watch(stream)
        return stream

    async def yields(lock: Any) -> bool:
        try:
            with trio.testing.assert_no_checkpoints():
                async with lock:
                    pass
        except AssertionError:
            return True
        return False

    async def pair() -> list[trio.SocketStream]:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        near = await trio.open_tcp_stream(*listener.socket.getsockname())
        far = await listener.accept()
        await listener.aclose()
        return [near, far]

    near, far = await pair()
    result: dict[str, Any] = {"bare lock yields": await yields(TrioTCPStream(far).read_lock)}
    stream = watched(far)
    result["locks are ours"] = isinstance(stream.read_lock, QuickLock) and isinstance(stream.write_lock, QuickLock)
    result["lock yields"] = await yields(stream.read_lock)

    inside = most = 0

    async def enter() -> None:
        nonlocal inside, most
        async with stream.write_lock:
            inside += 1
            most = max(most, inside)
            await trio.testing.wait_all_tasks_blocked()
            inside -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(enter)
    result["inside at once"] = most

    data = random.randbytes(1_000_000)
    await near.send_all(data[:100])
    got = await stream.read(2)
    try:
        result["left in the socket"] = len(far.socket._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        result["left in the socket"] = 0

    async def send_the_rest() -> None:
        await near.send_all(data[100:])
        await near.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_the_rest)
        while part := await stream.read(random.randrange(1, 100_000)):
            got += part
    result["in order"] = got == data
    result["end"] = (await stream.read(10)).decode()

    near, far = await pair()
    stream = watched(far)
    await near.send_all(b"more than two")
    await stream.read(2)
    await stream.close()
    result["closed"] = await stream.read(2) == b""  # py-libp2p's word for it
    return result


async def _main() -> None:
    result = await _sockets()
    result["bare windows"] = await _windows(wrapped=False)
    result["windows"] = await _windows(wrapped=True)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import trio

    trio.run(_main)
