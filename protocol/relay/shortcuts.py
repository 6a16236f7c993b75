"""Ways round a relay: a port of this machine for each port on loan that a stack wants to dial.

    own stack ----> 127.0.0.1:port ====(met outside, see punching.py)====> borrower ----> its listener
                                   \\---- else: relay's lent port -------/

Whoever dials such a port comes to the borrower without the relay, if the routers on the way let that be, and by the
relay if not. Both stacks dial ordinary addresses, so neither needs hole punching of its own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..addresses import Address
from ..errors import PeerUnreachable, Refused
from .asking import expect, reach, reach_to_meet, unreachable
from .punching import meet
from .splice import Ends, splice
from .wire import ANSWER_SECONDS, Met, Punch, Through, read, send

logger = logging.getLogger(__name__)

HERE = "127.0.0.1"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 30.0, 900.0  # after somebody could not be met
HELD_SECONDS = 10.0  # a connection that was prepared waits so long for its dialler


@dataclass
class _Shortcut:
    """To one port on loan."""

    lent: Address  # without a peer id
    listening: socket.socket
    pause: float = FIRST_PAUSE_SECONDS
    not_before: float = 0.0  # loop time of the next attempt
    prepared: Ends | None = None
    server: asyncio.Task[None] | None = None
    carried: set[asyncio.Task[None]] = field(default_factory=set)

    def here(self, peer_id: str) -> str:
        return str(Address.of_host(HERE, self.listening.getsockname()[1], peer_id))


class Shortcuts:
    """Local ports in place of those that one relay lends. Use it on one asyncio loop; `close` it there.

    Args:
        relay: its own port.
        met: told of each attempt, whether it went well.
    """

    def __init__(self, relay: Address, *, met: Callable[[bool], None] = lambda _: None) -> None:
        self._relay, self._met = relay, met
        self._shortcuts: dict[int, _Shortcut] = {}  # by the port on loan
        self._lends = range(0)  # until the relay has said which ports
        self._asking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask the relay which ports it lends; until it has said so, there are no shortcuts. Does not raise."""
        if not await self._ask():
            self._asking = asyncio.get_running_loop().create_task(self._keep_asking())

    def addresses(self, addresses: Sequence[str]) -> list[str]:
        """The same multiaddrs, those on loan from the relay replaced by ports of this machine."""
        return [self._here(address) or address for address in addresses]

    def replaces(self, address: str) -> bool:
        """Whether there is a port of this machine for it."""
        return self._here(address) is not None

    async def prepare(self, address: str) -> str | None:
        """Meet who listens at a port on loan, for a dialler that comes at once.

        Returns where to dial, or None if the address is not this relay's, or he cannot be met (now).
        """
        here = self._here(address)
        if here is None:
            return None
        shortcut = self._shortcuts[Address.parse(address).port]
        if shortcut.prepared is None:
            shortcut.prepared = await self._meet(shortcut)
            if shortcut.prepared is None:
                return None
            asyncio.get_running_loop().call_later(HELD_SECONDS, _let_go, shortcut, shortcut.prepared)
        return here

    async def close(self) -> None:
        """Hang up everywhere."""
        self._lends = range(0)
        tasks = [self._asking] if self._asking is not None else []
        for shortcut in self._shortcuts.values():
            tasks += [task for task in (shortcut.server, *shortcut.carried) if task is not None]
            if shortcut.prepared is not None:
                shortcut.prepared[1].close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for shortcut in self._shortcuts.values():
            shortcut.listening.close()

    def _here(self, address: str) -> str | None:
        """The port of this machine in place of a port on loan; made when it is asked for first."""
        try:
            asked = Address.parse(address)
        except ValueError:  # whatever a peer has signed; who dials it says what is wrong
            return None
        if asked.host != self._relay.host or asked.port not in self._lends:
            return None
        shortcut = self._shortcuts.get(asked.port)
        if shortcut is None:
            lent = Address.of_host(asked.host, asked.port)
            shortcut = self._shortcuts[asked.port] = _Shortcut(lent, socket.create_server((HERE, 0)))
            shortcut.listening.setblocking(False)
            shortcut.server = asyncio.get_running_loop().create_task(self._serve(shortcut))
        return shortcut.here(asked.peer_id)

    async def _ask(self) -> bool:
        try:
            (_, writer), hello = await reach(self._relay)
        except PeerUnreachable as error:
            logger.info("no shortcuts yet: %s", error.cause)
            return False
        writer.close()
        self._lends = range(hello.lends[0], hello.lends[1] + 1)
        return True

    async def _keep_asking(self) -> None:
        while True:
            await asyncio.sleep(FIRST_PAUSE_SECONDS)
            if await self._ask():
                return

    async def _serve(self, shortcut: _Shortcut) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(shortcut.listening)
            except OSError as error:  # no descriptors left, for a while
                logger.warning("port %d takes nobody now: %s", shortcut.lent.port, error)
                await asyncio.sleep(1.0)
                continue
            task = loop.create_task(self._carry(shortcut, connection))
            shortcut.carried.add(task)
            task.add_done_callback(shortcut.carried.discard)

    async def _carry(self, shortcut: _Shortcut, connection: socket.socket) -> None:
        own = await asyncio.open_connection(sock=connection)
        try:
            ends, shortcut.prepared = shortcut.prepared, None
            ends = ends or await self._meet(shortcut)
            if ends is None:
                async with asyncio.timeout(ANSWER_SECONDS):
                    ends = await asyncio.open_connection(shortcut.lent.host, shortcut.lent.port)
            await splice(own, ends)
        except (OSError, TimeoutError) as error:
            logger.debug("%s is not reached: %s", shortcut.lent, error)
        finally:
            own[1].close()

    async def _meet(self, shortcut: _Shortcut) -> Ends | None:
        """None if it cannot be, or was tried not long ago."""
        loop = asyncio.get_running_loop()
        if loop.time() < shortcut.not_before:
            return None
        shortcut.not_before = loop.time() + shortcut.pause  # others who come meanwhile do not wait for this attempt
        try:
            ends = await self._introduced(shortcut.lent.port)
        except (PeerUnreachable, Refused, OSError, TimeoutError, ValueError) as error:
            logger.info(
                "port %d is reached by the relay: %s", shortcut.lent.port, str(error) or "it could not be met outside"
            )
            shortcut.pause = min(2 * shortcut.pause, LONGEST_PAUSE_SECONDS)
            self._met(False)
            return None
        logger.info("whom port %d is lent to was met without the relay", shortcut.lent.port)
        shortcut.pause, shortcut.not_before = FIRST_PAUSE_SECONDS, 0.0
        self._met(True)
        return ends

    async def _introduced(self, port: int) -> Ends:
        (reader, writer), own_port = await reach_to_meet(self._relay)
        try:
            send(writer, Punch(port))
            ends = await meet(own_port, expect(Met, await read(reader, ANSWER_SECONDS)))
            send(writer, Through())
            return ends
        except Refused as error:
            raise unreachable(self._relay, error) from error
        finally:
            writer.close()


def _let_go(shortcut: _Shortcut, prepared: Ends) -> None:
    if shortcut.prepared is prepared:
        shortcut.prepared = None
        prepared[1].close()
