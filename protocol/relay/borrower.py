"""The side of a peer that nobody can dial: finding that out, borrowing ports, and taking what arrives there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..addresses import Address
from ..errors import PeerUnreachable, Refused, ShoalError
from ..identity import Identity
from .asking import expect, reach, reach_to_meet, unreachable
from .punching import meet
from .splice import Ends, splice
from .wire import (
    ANSWER_SECONDS,
    PING_SECONDS,
    SILENCE_SECONDS,
    Borrow,
    Incoming,
    Lent,
    Met,
    Ping,
    Probe,
    Probed,
    Take,
    read,
    send,
    to_sign,
)

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
MEETINGS, MEET_WINDOW_SECONDS = 60, 60.0
_GONE = (PeerUnreachable, Refused, OSError, TimeoutError)  # what asking a relay may come to
HEAR_SECONDS = 2.0  # from the relay's answer until what it said to the listeners is here


@dataclass(frozen=True)
class Seen:
    """How a relay sees this peer."""

    address: str  # that its connection came from
    reachable: bool  # all its listeners were dialled there


async def probe(relay: Address, host: str, ports: Sequence[int]) -> Seen:
    """Ask a relay to dial `ports`, at the address that it sees this peer at.

    Args:
        host: address that the listeners will have; nobody listens there yet.

    Raises:
        PeerUnreachable: the relay does not answer, or refuses.
        OSError: a port is taken.
    """
    heard: dict[int, asyncio.Event] = {port: asyncio.Event() for port in ports}
    (reader, writer), hello = await reach(relay)

    async def listen(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).strip() == hello.nonce.encode():  # else the port there is another machine's
            heard[port].set()
        writer.close()

    listeners = [await asyncio.start_server(partial(listen, port), host, port) for port in ports]
    try:
        send(writer, Probe(list(ports)))
        seen = expect(Probed, await read(reader, ANSWER_SECONDS))
        async with asyncio.timeout(HEAR_SECONDS if all(seen.answered) else 0):
            for event in heard.values():
                await event.wait()
    except TimeoutError:
        pass
    except (Refused, OSError) as error:
        raise unreachable(relay, error) from error
    finally:
        writer.close()
        for listener in listeners:
            listener.close()
    return Seen(seen.observed, all(event.is_set() for event in heard.values()))


async def reserve(relay: Address, identity: Identity) -> list[int]:
    """Borrow ports and let go at once; the relay keeps them for this peer for some minutes.

    Raises PeerUnreachable if it does not answer, or has none.
    """
    try:
        (_, writer), lent = await _borrow(relay, identity, ())
        writer.close()
    except (Refused, OSError, TimeoutError) as error:
        raise unreachable(relay, error) from error
    return lent.ports


class Borrower:
    """Keeps ports on loan and carries what arrives there to this peer's listeners.

    Args:
        ports: as reserved.
        listeners: where this peer listens, (host, port), one for each of `ports`.
        meets: whether diallers may be told this machine's address and be met without the relay.
    """

    def __init__(
        self,
        relay: Address,
        identity: Identity,
        ports: Sequence[int],
        listeners: Sequence[tuple[str, int]],
        *,
        meets: bool = True,
    ) -> None:
        self._meets = meets
        self._relay, self._identity, self._ports, self._listeners = relay, identity, list(ports), list(listeners)
        self._meetings: deque[float] = deque()
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled: borrow, and again whenever the connection breaks. The relay may restart meanwhile."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                (reader, writer), lent = await _borrow(self._relay, self._identity, self._ports, meets=self._meets)
                try:
                    if lent.ports != self._ports:
                        raise Refused("no-room", f"the relay lends {lent.ports}, and others were announced")
                    pause = FIRST_PAUSE_SECONDS
                    self.connected.set()
                    logger.info("reachable at %s by its ports %s", self._relay.host, self._ports)
                    await self._serve(reader, writer, lent.key)
                finally:
                    self.connected.clear()
                    writer.close()
            except _GONE as error:
                told = error.cause if isinstance(error, ShoalError) else error
                logger.warning("the relay %s is gone, trying again in %.0f s: %s", self._relay.host, pause, told)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        carrying: set[asyncio.Task[None]] = set()
        pinging = asyncio.create_task(_ping(writer))
        try:
            while True:
                message = await read(reader, SILENCE_SECONDS)
                if isinstance(message, Incoming):
                    answer = self._meet if message.meet else self._carry
                    if message.meet and not self._may_meet():
                        continue
                    task = asyncio.create_task(answer(Take(key, message.id), message.listener))
                    carrying.add(task)
                    task.add_done_callback(carrying.discard)
                elif not isinstance(message, Ping):
                    raise Refused("malformed", f"{type(message).__name__} was not expected")
        finally:
            for task in (pinging, *carrying):
                task.cancel()
            await asyncio.gather(pinging, *carrying, return_exceptions=True)

    async def _carry(self, take: Take, listener: int) -> None:
        try:
            (reader, writer), _ = await reach(self._relay)
            try:
                send(writer, take)
                await splice((reader, writer), await self._listener(listener))
            finally:
                writer.close()
        except _GONE as error:
            logger.debug("a connection by the relay was not carried: %s", error)

    async def _meet(self, take: Take, listener: int) -> None:
        """Dial somebody who dials us at the same time; from then on the relay has no part in it."""
        try:
            (reader, writer), own_port = await reach_to_meet(self._relay)
            try:
                send(writer, take)
                there = expect(Met, await read(reader, ANSWER_SECONDS))
                ends = await meet(own_port, there)
            finally:
                writer.close()
            try:
                await splice(ends, await self._listener(listener))
            finally:
                ends[1].close()
        except (*_GONE, ValueError) as error:
            logger.debug("nobody was met: %s", error)

    async def _listener(self, index: int) -> Ends:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asyncio.open_connection(*self._listeners[index])

    def _may_meet(self) -> bool:
        """Not too often: a relay that lies could have us dial strangers."""
        if not self._meets:
            return False
        now = time.monotonic()
        while self._meetings and self._meetings[0] < now - MEET_WINDOW_SECONDS:
            self._meetings.popleft()
        if len(self._meetings) >= MEETINGS:
            return False
        self._meetings.append(now)
        return True


async def _ping(writer: asyncio.StreamWriter) -> None:
    while True:
        send(writer, Ping())
        await asyncio.sleep(PING_SECONDS)


async def _borrow(relay: Address, identity: Identity, ports: Sequence[int], *, meets: bool = True) -> tuple[Ends, Lent]:
    (reader, writer), hello = await reach(relay)
    send(writer, Borrow(identity.peer_id, list(ports), identity.sign(to_sign(hello.nonce)).hex(), meets))
    try:
        return (reader, writer), expect(Lent, await read(reader, ANSWER_SECONDS))
    except BaseException:
        writer.close()
        raise
