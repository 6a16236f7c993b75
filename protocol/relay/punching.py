"""TCP hole punching: two peers behind routers dial each other at the same time, from ports that a relay has seen.

A router lets packets in that look like answers. So each peer dials the other's public port from the very port that its
router already maps, and listens there too: whichever SYN comes after the other side's own one passes. Routers that map
a port anew for each destination (symmetric NAT) cannot be passed in this way, and the relay goes on carrying.

Ford, Srisuresh, Kegel: Peer-to-Peer Communication Across Network Address Translators, 2005; RFC 5128.
"""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress
from ipaddress import ip_address

from .splice import Ends
from .wire import MAX_LINE, MEET_SECONDS, Met, watch

ATTEMPT_SECONDS = 1.5  # the kernel repeats a SYN after one
PAUSE_SECONDS = (0.01, 0.1)  # after a refusal, at random: two SYNs must pass each other on the way
GREET_SECONDS = 1.5


async def open_to_meet(host: str, port: int) -> tuple[Ends, int]:
    """Dial from a port that `meet` can use again. Returns the connection and that port. OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    dialling = _socket(family, 0)
    try:
        await loop.sock_connect(dialling, address)
        ends = await asyncio.open_connection(sock=dialling, limit=MAX_LINE)
    except BaseException:
        dialling.close()
        raise
    return ends, int(ends[1].get_extra_info("sockname")[1])


async def meet(own_port: int, there: Met) -> Ends:
    """The one connection to whoever stands at `there` and does the same. TimeoutError if there is none in time.

    ValueError if the relay says something that is no IP address.
    """
    family = socket.AF_INET if ip_address(there.host).version == 4 else socket.AF_INET6
    found: asyncio.Future[Ends] = asyncio.get_running_loop().create_future()
    tasks = [asyncio.create_task(attempt(family, own_port, there, found)) for attempt in (_dial, _listen)]
    try:
        async with asyncio.timeout(MEET_SECONDS):
            return await found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _dial(family: int, own_port: int, there: Met, found: asyncio.Future[Ends]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        with suppress(OSError, TimeoutError):
            dialling = _socket(family, own_port)
            try:
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    await loop.sock_connect(dialling, (there.host, there.port))
            except BaseException:
                dialling.close()
                raise
            await _greet(dialling, there.token, found)
        await asyncio.sleep(random.uniform(*PAUSE_SECONDS))


async def _listen(family: int, own_port: int, there: Met, found: asyncio.Future[Ends]) -> None:
    loop = asyncio.get_running_loop()
    with _socket(family, own_port) as listening:
        listening.listen(4)
        while True:
            accepted, _ = await loop.sock_accept(listening)
            with suppress(OSError, TimeoutError):
                await _greet(accepted, there.token, found)


async def _greet(connection: socket.socket, token: str, found: asyncio.Future[Ends]) -> None:
    """Both say the token, and hear it. The connection is closed unless it is the one that was found."""
    try:
        ends = await asyncio.open_connection(sock=connection)
    except BaseException:
        connection.close()
        raise
    try:
        watch(ends[1])
        line = token.encode() + b"\n"
        ends[1].write(line)
        async with asyncio.timeout(GREET_SECONDS):
            heard = await ends[0].readexactly(len(line))
    except asyncio.IncompleteReadError as error:
        ends[1].close()
        raise ConnectionResetError("it hung up") from error
    except BaseException:
        ends[1].close()
        raise
    if heard == line and not found.done():
        found.set_result(ends)
    else:
        ends[1].close()


def _socket(family: int, port: int) -> socket.socket:
    """Bound to all addresses. Several may have one port at a time, if none of them was given it by the kernel."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        if port:
            _share(made)
            made.bind(("", port))
        else:
            made.bind(("", 0))
            _share(made)  # only now: the kernel could choose a port that others share
    except BaseException:
        made.close()
        raise
    return made


def _share(made: socket.socket) -> None:
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)
