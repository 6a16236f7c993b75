"""What a hostile peer can do to the data plane: cost its own stream, nothing else.

The hostile peer is py-libp2p in a process of its own (it cannot share one with hivemind), run from this file.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shoal.protocol.transport import wire
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.downloads import FetchEnded, FetchQuery, Resource
from shoal.protocol.transport.limits import Limits
from shoal.protocol.transport.wire import Reason

PATIENCE_SECONDS = 20.0
RESOURCE = Resource(bytes(range(256)) * 40_000)  # 10 MB

ATTACKS = ["garbage", "oversized", "truncated", "empty", "drip", "stall", "many", "gossip", "unknown", "negotiation"]


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        await asyncio.sleep(0.01)


async def victim(directory: Path, name: str) -> Transport:
    limits = Limits(read_deadline_seconds=1.0, max_served_streams_per_peer=2)
    peer = await Transport.start(identity_path=directory / f"{name}.key", run_id="run", limits=limits)

    async def answer(query: FetchQuery) -> Resource | None:
        return RESOURCE if query.resource == "x" else None

    peer.serve(answer)
    return peer


def test_an_attack_costs_its_own_stream_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        server, friend = await asyncio.gather(victim(tmp_path, "server"), victim(tmp_path, "friend"))
        attacker = await asyncio.create_subprocess_exec(
            sys.executable, "-P", __file__, server.addrs[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        try:
            heard: list[bytes] = []
            await server.subscribe("topic", lambda _, data: heard.append(data))
            await friend.connect(server.addrs)
            for kind in ATTACKS:
                attacker.stdin.write(kind.encode() + b"\n")
                result = json.loads(await asyncio.wait_for(attacker.stdout.readline(), PATIENCE_SECONDS))
                print(f"\n{kind}: {result}")
                assert result["alive"], f"{kind}: the attacker's other streams suffer too"
                match kind:
                    case "garbage" | "oversized" | "drip" | "stall":
                        assert result["cut"], f"{kind}: the stream was not cut"
                    case "many":
                        assert result["busy"] >= result["opened"] / 2
                    case "gossip":
                        await until(lambda: server.counters.garbage > 3, "bad gossip to be counted")
                got = await friend.fetch(server.addrs, "x", deadline_seconds=10, max_bytes=10**8)
                assert got.data == RESOURCE.data, kind
                await friend.publish("topic", kind.encode())
                await until(lambda kind=kind: kind.encode() in heard, f"gossip after {kind}")
            assert b"forged" not in heard
            assert server.restarts == 0
        finally:
            attacker.kill()
            await attacker.communicate()
            await asyncio.gather(server.close(), friend.close())

    asyncio.run(asyncio.wait_for(scenario(), 100))


def test_bytes_on_the_bare_port_do_no_harm(tmp_path: Path) -> None:
    async def scenario() -> None:
        server, friend = await asyncio.gather(victim(tmp_path, "server"), victim(tmp_path, "friend"))
        try:
            host, port = server.addrs[0].split("/")[2], int(server.addrs[0].split("/")[4])
            idle = [socket.create_connection((host, port)) for _ in range(20)]
            for connection in idle[:10]:
                connection.sendall(os.urandom(5000))
            got = await friend.fetch(server.addrs, "x", deadline_seconds=10, max_bytes=10**8)
            assert got.data == RESOURCE.data
            assert server.restarts == 0
            for connection in idle:
                connection.close()
        finally:
            await asyncio.gather(server.close(), friend.close())

    asyncio.run(asyncio.wait_for(scenario(), 60))


LIES = {
    "garbage": Reason.GARBAGE,
    "huge": Reason.TOO_LARGE,
    "short": Reason.CUT,
    "wrong": Reason.DIGEST,
    "anew": Reason.CUT,
    "spoilt": Reason.DIGEST,
    "silence": Reason.DEADLINE,
    "meta": Reason.GARBAGE,
}


def test_a_lying_server_is_found_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        asker = await victim(tmp_path, "asker")
        liar = await asyncio.create_subprocess_exec(
            sys.executable, "-P", __file__, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert liar.stdout is not None
            addr = (await liar.stdout.readline()).decode().strip()
            for lie, reason in LIES.items():
                with pytest.raises(FetchEnded) as caught:
                    async with asyncio.timeout(10):  # what comes in the meantime puts the deadline off
                        await asker.fetch([addr], lie, deadline_seconds=3, max_bytes=10**6)
                assert caught.value.reason == reason, f"{lie}: {caught.value}"
            assert asker.restarts == 0
        finally:
            liar.kill()
            await liar.communicate()
            await asker.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


# --- the hostile peer -------------------------------------------------------------------------------------------------


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


REQUEST = wire.pack(wire.Request("run", "x", 0, b""))


async def hostile(addr: str) -> None:
    """Carries out the attacks named on standard input, one per line; a JSON line answers each."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.pubsub.pb import rpc_pb2
    from libp2p.utils import encode_varint_prefixed
    from multiaddr import Multiaddr

    host = new_host(muxer_preference="YAMUX")
    info = info_from_p2p_addr(Multiaddr(addr))

    async def opened(protocol: str = wire.PROTOCOL) -> Any:
        return await host.new_stream(info.peer_id, [TProtocol(protocol)])

    async def cut(stream: Any) -> bool:
        """Whether the victim ends the stream soon."""
        with trio.move_on_after(8):
            try:
                while await stream.read(65536):
                    pass
            except BaseLibp2pError:
                pass
            return True
        return False

    async def drip() -> dict[str, Any]:
        stream = await opened()
        for byte in REQUEST:
            try:
                await stream.write(bytes([byte]))
            except BaseLibp2pError:
                return {"cut": True}
            await trio.sleep(0.2)
        return {"cut": await cut(stream)}

    async def many() -> dict[str, Any]:
        streams = [await opened() for _ in range(30)]
        answers: list[bytes] = []
        for stream in streams:
            with trio.move_on_after(0.2), contextlib.suppress(BaseLibp2pError):
                answers.append(await stream.read(100))
        for stream in streams:
            await stream.reset()
        return {"opened": len(streams), "busy": sum(b"busy" in answer for answer in answers)}

    async def gossip() -> None:
        bad = rpc_pb2.Message(data=b"x", topicIDs=["/shoal/run/topic"], from_id=b"\x00\x01", seqno=b"1")
        bad.key, bad.signature = b"\xff\xff", b"nonsense"
        forged = rpc_pb2.Message(data=b"forged", topicIDs=["/shoal/run/topic"], seqno=b"2")
        forged.from_id, forged.signature = host.get_id().to_bytes(), bytes(64)
        rpc = rpc_pb2.RPC(publish=[bad, forged])
        await (await opened("/meshsub/1.2.0")).write(encode_varint_prefixed(rpc.SerializeToString()))
        await (await opened("/meshsub/1.2.0")).write(encode_varint_prefixed(os.urandom(500)))

    async def attack(kind: str) -> dict[str, Any]:
        match kind:
            case "garbage":
                stream = await opened()
                await stream.write(frame(os.urandom(200)))
                return {"cut": await cut(stream)}
            case "oversized":
                stream = await opened()
                await stream.write(struct.pack(">I", 2**31) + bytes(100_000))
                return {"cut": await cut(stream)}
            case "truncated":
                stream = await opened()
                await stream.write(REQUEST[:-3])
                await stream.close()
            case "empty":
                for _ in range(10):
                    await (await opened()).reset()
            case "drip":
                return await drip()
            case "stall":  # asks, and never reads the answer's body
                stream = await opened()
                await stream.write(REQUEST)
                await trio.sleep(3)
                return {"cut": await cut(stream)}
            case "many":
                return await many()
            case "gossip":
                await gossip()
            case "unknown":
                with contextlib.suppress(BaseLibp2pError):
                    await opened("/shoal/unknown/1")
            case "negotiation":
                raw = await host.get_network().new_stream(info.peer_id)
                await raw.write(os.urandom(3000))
        return {}

    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.connect(info)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            result = await attack(line.strip())
            stream = await opened()
            await stream.write(REQUEST)
            result["alive"] = len(await stream.read(100)) > 0
            await stream.reset()
            print(json.dumps(result), flush=True)


async def liar() -> None:
    """Answers each request with the lie that it names."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from multiaddr import Multiaddr

    attempts = 0

    async def answer(stream: Any) -> None:
        nonlocal attempts
        request = wire.unpack_request((await stream.read(1000))[4:])
        match request.resource:
            case "garbage":
                await stream.write(frame(os.urandom(100)))
            case "huge":
                await stream.write(wire.pack(wire.Header(10**12, 0, bytes(32), b"")))
            case "short":
                await stream.write(wire.pack(wire.Header(1000, 0, bytes(32), b"")))
            case "wrong":
                await stream.write(wire.pack(wire.Header(1000, 0, bytes(32), b"")) + bytes(1000))
            case "silence":
                await trio.sleep_forever()
            case "meta":
                await stream.write(wire.pack(wire.Header(10, 0, bytes(32), bytes(10**6))))
            case "anew":  # another resource at each attempt, and more of it
                attempts += 1
                await stream.write(wire.pack(wire.Header(10**6, 0, os.urandom(32), b"")) + bytes(20_000 * attempts))
            case "spoilt":  # in two parts, which never are what was promised
                size, start = 100_000, request.offset
                await stream.write(wire.pack(wire.Header(size, start, bytes(32), b"")) + bytes(size // 2))
        await stream.close()

    host = new_host(muxer_preference="YAMUX")
    host.set_stream_handler(TProtocol(wire.PROTOCOL), answer)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    import trio

    trio.run(*(hostile, sys.argv[1]) if len(sys.argv) > 1 else (liar,))
