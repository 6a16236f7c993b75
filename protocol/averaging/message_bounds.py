"""How long a message of the all-reduce or of matchmaking may be. hivemind's streams believe the length that a peer
announces, 2^64 bytes at most, and keep all that comes of it: anybody who can dial an averager could fill its memory.
"""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P

MAX_MESSAGE_BYTES = 4 << 20  # as p2pd has it for calls without streams; a part is a sixteenth of it


def bound_messages() -> None:
    """From now on a stream of this process that announces a longer one ends, with ValueError for who reads it."""
    P2P.receive_raw_data = staticmethod(_receive)


async def _receive(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes was announced")
    return await reader.readexactly(size)
