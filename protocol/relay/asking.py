"""Connections to a relay, from whichever side."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from ..addresses import Address
from ..errors import PeerUnreachable, Refused
from .punching import open_to_meet
from .splice import Ends
from .wire import ANSWER_SECONDS, MAX_LINE, Hello, Message, Sorry, read, watch

M = TypeVar("M", bound=Message)


async def reach(relay: Address) -> tuple[Ends, Hello]:
    """A connection to a relay, and what it said. PeerUnreachable if there is none."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            ends = await asyncio.open_connection(relay.host, relay.port, limit=MAX_LINE)
        return ends, await _greeted(ends)
    except (Refused, OSError, TimeoutError) as error:
        raise unreachable(relay, error) from error


async def reach_to_meet(relay: Address) -> tuple[Ends, int]:
    """A connection from a port that others will dial, and that port. PeerUnreachable if there is none."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            ends, port = await open_to_meet(relay.host, relay.port)
        await _greeted(ends)
        return ends, port
    except (Refused, OSError, TimeoutError) as error:
        raise unreachable(relay, error) from error


async def _greeted(ends: Ends) -> Hello:
    watch(ends[1])
    try:
        return expect(Hello, await read(ends[0], ANSWER_SECONDS))
    except BaseException:
        ends[1].close()
        raise


def expect(kind: type[M], message: Message) -> M:
    """The message, if it is of that kind. Raises Refused, with the relay's own reason if it gave one."""
    if isinstance(message, Sorry):
        raise Refused("refused", message.reason)
    if not isinstance(message, kind):
        raise Refused("malformed", f"{type(message).__name__} in place of {kind.__name__}")
    return message


def unreachable(relay: Address, error: Exception) -> PeerUnreachable:
    """What to tell whoever wanted something of a relay."""
    told = error.cause if isinstance(error, Refused) else str(error) or type(error).__name__
    return PeerUnreachable(
        f"the relay at {relay.host} port {relay.port} is of no use: {told}",
        fix="open a port and name it by --announce, or ask for an invite of a run whose relay has room",
    )
