"""Peers that use the streams of calls in their own ways: py-libp2p, in a process started from this file.

call_peers.py           answers calls, and ends streams where their names say so
call_peers.py ADDR      calls ADDR on many streams, and ends none of them
"""

import hashlib
import json
import sys
from typing import Any

from shoal.protocol.transport import call_wire

BODY = b"body"
_OPENING = call_wire.Opening("run", "x", len(BODY), hashlib.sha256(BODY).digest())
_PATIENCE_SECONDS = 20.0


async def _answer_in_ways() -> None:
    """An answerer whose reply is the number of the stream. It says so when the fifth and all before it have ended."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError
    from multiaddr import Multiaddr

    opened = ended = 0

    async def one(stream: Any, number: int, before: str) -> str:
        """A call; `before` is the name of the one before it. Returns its own."""
        opening = call_wire.unpack_opening((await stream.read(1000))[4:])
        match before:
            case "end at the next":
                await stream.close()
                return "end"
            case "cut at the next":
                await stream.reset()
                return "end"
        await stream.write(call_wire.pack(call_wire.Go()))
        if opening.name == "cut after Go":
            await stream.reset()
            return "end"
        if opening.size:
            assert await stream.read(opening.size) == BODY
        await stream.write(call_wire.pack(call_wire.Reply(str(number).encode())))
        if opening.name == "end after this":
            await stream.close()
            return "end"
        return opening.name

    async def answer(stream: Any) -> None:
        nonlocal opened, ended
        opened += 1
        number, name = opened, ""
        try:
            while name != "end":
                name = await one(stream, number, name)
        except (BaseLibp2pError, EOFError):
            pass
        ended += 1
        if ended == 5:
            print("5 ended", flush=True)

    host = new_host(muxer_preference="YAMUX")
    host.set_stream_handler(TProtocol(call_wire.PROTOCOL), answer)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


async def _hoard(addr: str) -> None:
    """Calls on eight streams, and ends none of them."""
    import trio
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from libp2p.exceptions import BaseLibp2pError
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = new_host(muxer_preference="YAMUX")
    info = info_from_p2p_addr(Multiaddr(addr))

    async def call(stream: Any) -> None:
        await stream.write(call_wire.pack(_OPENING))
        assert await stream.read(100) == call_wire.pack(call_wire.Go())
        await stream.write(BODY)
        assert await stream.read(100) == call_wire.pack(call_wire.Reply(BODY))

    async def ended(stream: Any, seconds: float) -> bool:
        try:
            with trio.move_on_after(seconds):
                return not await stream.read(1)
        except (BaseLibp2pError, EOFError):
            return True
        return False

    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.connect(info)
        kept, closed = [], 0
        for _ in range(8):
            stream = await host.new_stream(info.peer_id, [TProtocol(call_wire.PROTOCOL)])
            await call(stream)
            if len(kept) >= 3 and await ended(stream, _PATIENCE_SECONDS):
                closed += 1
            else:
                kept.append(stream)
        print(json.dumps({"open": len(kept), "closed": closed}), flush=True)
        for stream in kept:
            await call(stream)
        print(json.dumps({"called again": len(kept)}), flush=True)
        left = [stream for stream in kept if not await ended(stream, _PATIENCE_SECONDS)]
        print(json.dumps({"open": len(left)}), flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    import trio

    if len(sys.argv) > 1:
        trio.run(_hoard, sys.argv[1])
    else:
        trio.run(_answer_in_ways)
