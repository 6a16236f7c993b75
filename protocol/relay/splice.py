"""Joining two connections: what comes in at one goes out at the other, both ways, until both have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..pacing import UNLIMITED, Pace
from .wire import CHUNK

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def splice(one: Ends, other: Ends, count: Callable[[int], None] = lambda _: None, pace: Pace = UNLIMITED) -> None:
    """Carry bytes until both directions are at their end or either connection breaks; closes both. Does not raise.

    A slow receiver holds its sender back: nothing is kept but what the sockets hold.

    Args:
        count: told the size of every piece.
        pace: what every piece takes from, both ways.
    """
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_carry(one[0], other[1], count, pace))
            both.create_task(_carry(other[0], one[1], count, pace))
    except* (OSError, RuntimeError):  # asyncio raises RuntimeError on a transport that is closing
        pass
    finally:
        for _, writer in (one, other):
            writer.close()


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None], pace: Pace
) -> None:
    while piece := await reader.read(CHUNK):
        await asyncio.sleep(max(pace.down(len(piece)), pace.up(len(piece))))
        writer.write(piece)
        await writer.drain()
        count(len(piece))
    writer.write_eof()
