"""A relay's side: lending ports, and dialling back whoever asks."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import BadSignature, Refused
from ..identity import verify
from ..pacing import UNLIMITED, Pace
from .splice import Ends, splice
from .wire import (
    ANSWER_SECONDS,
    MAX_LINE,
    MEET_SECONDS,
    PORTS_EACH,
    SILENCE_SECONDS,
    Borrow,
    Hello,
    Incoming,
    Lent,
    Met,
    Ping,
    Probe,
    Probed,
    Punch,
    Sorry,
    Take,
    Through,
    read,
    send,
    to_sign,
    watch,
)

logger = logging.getLogger(__name__)

MAX_STREAMS = 256  # connections that are carried for one borrower at a time
MAX_CLIENTS = 1024  # connections to the relay's own port, whatever is carried at others
MAX_CLIENTS_EACH = 128  # of these from one address
PROBES, PUNCHES, QUOTA_SECONDS = 8, 60, 60.0  # from one address
DIAL_SECONDS = 3.0
APART_SECONDS = 3.0  # so long a connection waits between two who have just met: the one outside shall be first
KEEP_SECONDS = 600.0  # a port stays its borrower's so long after the connection has broken


@dataclass
class _Loan:
    """What one borrower has, while its control connection lasts."""

    peer_id: str
    ports: list[int]
    control: asyncio.StreamWriter
    meets: bool
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    servers: list[asyncio.Server] = field(default_factory=list)
    waiting: dict[int, asyncio.Future[Ends]] = field(default_factory=dict)  # connections that it has been told of
    streams: int = 0
    lent: bool = False  # its ports are open, and it has been told of them
    ended: bool = False


class Lender:
    """Lends the ports of a range, two to each peer. The first port of the range is where to ask.

    Args:
        host: address to listen at.
        ports: all of them open to the world.
        count: told the size of every piece that is carried.

    Attributes:
        borrowers: peers that have ports now.
    """

    def __init__(
        self,
        host: str,
        ports: Sequence[int],
        *,
        count: Callable[[int], None] = lambda _: None,
        pace: Pace = UNLIMITED,
    ) -> None:
        self._pace = pace
        self._host, self._port, self._ports, self._count = host, ports[0], ports[1:], count
        self._loans: dict[str, _Loan] = {}  # by peer id
        self._kept: dict[int, tuple[str, float]] = {}  # by port: whose it is, and until when (monotonic; inf: lent)
        self._ids = itertools.count()
        self._probes, self._punches = _Quota("probes", PROBES), _Quota("introductions", PUNCHES)
        self._apart: dict[frozenset[str], float] = {}  # addresses that have met, and until when (monotonic)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: Counter[str] = Counter()  # connections to the own port, by address

    @property
    def borrowers(self) -> list[str]:
        return sorted(peer_id for peer_id, loan in self._loans.items() if loan.lent)

    async def start(self) -> None:
        """Begin to listen. OSError if the port is not free."""
        self._server = await asyncio.start_server(self._spawned(self._client), self._host, self._port, limit=MAX_LINE)

    async def close(self) -> None:
        """Take everything back."""
        if self._server is not None:
            self._server.close()
        for loan in list(self._loans.values()):
            self._end(loan)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawned(
        self, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(handle(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return begin

    # -- the relay's own port --------------------------------------------------------------------------------------

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = _host_of(writer)
        if self._clients.total() >= MAX_CLIENTS or self._clients[address] >= MAX_CLIENTS_EACH:
            writer.close()
            return
        self._clients[address] += 1
        try:
            await self._answer(reader, writer)
        finally:
            self._clients[address] -= 1
            self._clients += Counter()  # without those that have none

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce, taken = secrets.token_hex(16), False
        try:
            watch(writer)
            send(writer, Hello(nonce, (min(self._ports), max(self._ports))))
            message = await read(reader, ANSWER_SECONDS)
            match message:
                case Probe():
                    await self._probe(message, nonce, writer)
                case Borrow():
                    await self._lend(message, nonce, reader, writer)
                case Punch():
                    await self._introduce(message, (reader, writer))
                case Take():
                    taken = self._take(message, (reader, writer))
                case _:
                    raise Refused("malformed", f"{type(message).__name__} is no request")
            await writer.drain()
        except Refused as error:
            send(writer, Sorry(error.cause[:200]))
        except (OSError, TimeoutError) as error:
            logger.debug("a relay's client: %s", error)
        finally:
            if not taken:
                writer.close()

    async def _probe(self, message: Probe, nonce: str, writer: asyncio.StreamWriter) -> None:
        """Only back to where the question came from: nobody can have others dialled."""
        observed = _host_of(writer)
        self._probes.take(observed)
        answered = await asyncio.gather(*(_dial(observed, port, nonce) for port in message.ports))
        send(writer, Probed(observed, list(answered)))

    async def _lend(
        self, message: Borrow, nonce: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            verify(message.peer_id, to_sign(nonce), bytes.fromhex(message.signature))
        except BadSignature as error:
            raise Refused("unsigned", error.cause) from error
        before = self._loans.get(message.peer_id)
        if before is not None:  # it has noticed sooner than this end that the connection is gone
            self._end(before)
        loan = _Loan(message.peer_id, self._choose(message), writer, message.meets)
        # Before anything is waited for: whoever borrows meanwhile gets other ports.
        self._loans[loan.peer_id] = loan
        self._kept |= dict.fromkeys(loan.ports, (loan.peer_id, float("inf")))
        try:
            for index, port in enumerate(loan.ports):
                arrived = self._spawned(partial(self._arrived, loan, index))
                loan.servers.append(await asyncio.start_server(arrived, self._host, port))
            if loan.ended:  # this peer has asked again meanwhile
                return
            loan.lent = True
            send(writer, Lent(loan.ports, loan.key))
            logger.info("ports %s are lent to %s", loan.ports, loan.peer_id)
            while isinstance(await read(reader, SILENCE_SECONDS), Ping):
                send(writer, Ping())
        finally:
            self._end(loan)

    def _choose(self, message: Borrow) -> list[int]:
        """The wanted ports if nobody else has them, else free ones.

        Each peer's are looked for from another place on: those who come first after this relay has started do not get
        what those had who have not come back yet, and who are reached nowhere else.
        """
        now = time.monotonic()
        drawn = int.from_bytes(hashlib.sha256(message.peer_id.encode()).digest()[:8])
        start = drawn % (len(self._ports) // PORTS_EACH or 1) * PORTS_EACH
        self._kept = {port: kept for port, kept in self._kept.items() if kept[1] > now}
        mine = [port for port, (peer_id, _) in self._kept.items() if peer_id == message.peer_id]
        free = [port for port in (*self._ports[start:], *self._ports[:start]) if port not in self._kept]
        wanted = list(dict.fromkeys(message.ports or mine))
        if len(wanted) == PORTS_EACH and set(wanted) <= {*mine, *free}:
            return wanted
        if len(free) < PORTS_EACH:
            raise Refused("no-room", "all ports of this relay are lent")
        return free[:PORTS_EACH]

    def _end(self, loan: _Loan) -> None:
        loan.ended = True
        for server in loan.servers:
            server.close()
        for waiting in loan.waiting.values():
            waiting.cancel()
        if self._loans.get(loan.peer_id) is loan:
            del self._loans[loan.peer_id]
            # Ports that could not be opened are no good to keep.
            until = time.monotonic() + KEEP_SECONDS if loan.lent else 0.0
            self._kept |= dict.fromkeys(loan.ports, (loan.peer_id, until))
            logger.info("ports %s are no longer lent to %s", loan.ports, loan.peer_id)
        loan.control.close()

    def _take(self, message: Take, ends: Ends) -> bool:
        for loan in self._loans.values():
            if secrets.compare_digest(loan.key, message.key):
                waiting = loan.waiting.pop(message.id, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(ends)
                    return True
        raise Refused("unknown", "nobody waits for that")

    # -- lent ports ------------------------------------------------------------------------------------------------

    async def _arrived(
        self, loan: _Loan, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if loan.ended or loan.streams >= MAX_STREAMS:
            writer.close()
            return
        loan.streams += 1
        try:
            watch(writer)
            hosts = frozenset(map(_host_of, (writer, loan.control)))
            await asyncio.sleep(max(0.0, self._apart.get(hosts, 0.0) - time.monotonic()))
            ends = await self._called(loan, index)
            await splice((reader, writer), ends, self._count, self._pace)
        except (OSError, TimeoutError) as error:
            logger.debug("%s did not take a connection: %s", loan.peer_id, error)
        finally:
            loan.streams -= 1
            writer.close()

    async def _called(self, loan: _Loan, index: int, *, meet: bool = False) -> Ends:
        """A connection of the borrower's, made for one of its ports. TimeoutError if it makes none."""
        number = next(self._ids)
        waiting: asyncio.Future[Ends] = asyncio.get_running_loop().create_future()
        loan.waiting[number] = waiting
        try:
            send(loan.control, Incoming(number, index, meet))
            async with asyncio.timeout(ANSWER_SECONDS):
                return await waiting
        finally:
            loan.waiting.pop(number, None)

    async def _introduce(self, message: Punch, dialler: Ends) -> None:
        """Tell a dialler and a borrower where each is seen, and leave them to it."""
        self._punches.take(_host_of(dialler[1]))
        found = [loan for loan in self._loans.values() if loan.lent and message.port in loan.ports]
        if not found:
            raise Refused("unknown", f"port {message.port} is not lent")
        if not found[0].meets:
            raise Refused("declined", f"whom port {message.port} is lent to is reached by the relay only")
        borrower = await self._called(found[0], found[0].ports.index(message.port), meet=True)
        try:
            token = secrets.token_hex(16)
            for (_, one), (_, other) in ((dialler, borrower), (borrower, dialler)):
                host, port = other.get_extra_info("peername")[:2]
                send(one, Met(host, port, token))
            # Routers keep a port's mapping while a connection from it lasts.
            if isinstance(await read(dialler[0], MEET_SECONDS + ANSWER_SECONDS), Through):
                hosts = frozenset(_host_of(writer) for _, writer in (dialler, borrower))
                now = time.monotonic()
                self._apart = {pair: until for pair, until in self._apart.items() if until > now}
                self._apart[hosts] = now + APART_SECONDS
        finally:
            borrower[1].close()


class _Quota:
    """How often each address may ask for something in `QUOTA_SECONDS`."""

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most
        self._times: dict[str, deque[float]] = defaultdict(deque)
        self._looked_at = time.monotonic()

    def take(self, address: str) -> None:
        """Raises Refused(`quota`)."""
        now, recent = time.monotonic(), self._times[address]
        while recent and recent[0] < now - QUOTA_SECONDS:
            recent.popleft()
        if len(recent) >= self._most:
            raise Refused("quota", f"{self._most} {self._what} a minute, not more")
        recent.append(now)
        if now - self._looked_at >= QUOTA_SECONDS:  # of those who came once nothing is kept for ever
            self._looked_at = now
            since = now - QUOTA_SECONDS
            lately = {host: times for host, times in self._times.items() if times[-1] >= since}
            self._times = defaultdict(deque, lately)


def _host_of(writer: asyncio.StreamWriter) -> str:
    """The address at the other end; empty if it had hung up before it was looked at, as port scanners do."""
    return str((writer.get_extra_info("peername") or ("",))[0])


async def _dial(host: str, port: int, nonce: str) -> bool:
    """Whether somebody takes a connection there; it is told the nonce, by which it knows who calls."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
            writer.write(nonce.encode() + b"\n")
            await writer.drain()
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
