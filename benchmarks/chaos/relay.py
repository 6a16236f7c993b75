"""Latency without netem: every connection to a peer passes a relay in its namespace, which holds bytes back.

A peer listens at 127.0.0.1 and announces its own address; the relay takes connections there, on the same ports. Half of
the round trip is added each way. The TCP handshake itself is not delayed, and windows are those of two short links.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Coroutine
from typing import Any

from .network import Network

CHUNK_BYTES = 1 << 16
QUEUED_CHUNKS = 256  # 16 MiB each way and connection may be under way; then the sender waits


class Relays:
    """All relays of a run, on one thread. Latencies can change at any time.

    Args:
        jitter: of every chunk's delay, as a part of it; order is kept.
    """

    def __init__(self, network: Network, jitter: float = 0.0, seed: int = 0) -> None:
        self._network, self._jitter, self._random = network, jitter, random.Random(seed)
        self._seconds: dict[str, float] = {}  # by host, one way
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        self._thread.start()

    def serve(self, host: str, port: int) -> None:
        """Relay what comes to `host` at `port`, for as long as this lives."""
        with self._network.inside(host):
            listener = socket.create_server((self._network.address(host), port))
        listener.setblocking(False)
        self._seconds.setdefault(host, 0.0)
        asyncio.run_coroutine_threadsafe(self._start(host, port, listener), self._loop).result()

    def set_latency(self, host: str, milliseconds: float) -> None:
        """What reaching `host` adds to a round trip."""
        self._seconds[host] = milliseconds / 2000

    def close(self) -> None:
        """Cut all connections."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self, host: str, port: int, listener: socket.socket) -> None:
        self._spawn(self._accept(host, port, listener))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, host: str, port: int, listener: socket.socket) -> None:
        with listener:
            while True:
                accepted, _ = await self._loop.sock_accept(listener)
                self._spawn(self._connect(host, port, accepted))

    async def _connect(self, host: str, port: int, accepted: socket.socket) -> None:
        with self._network.inside(host):  # nothing is awaited in here
            onward = socket.socket()
        with accepted, onward:
            for end in (accepted, onward):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._loop.sock_connect(onward, ("127.0.0.1", port))
            except OSError:
                return  # the peer is not up: whoever dialled sees the connection close
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(host, accepted, onward))
                both.create_task(self._pass_on(host, onward, accepted))

    async def _pass_on(self, host: str, source: socket.socket, target: socket.socket) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)

        async def read() -> None:
            data = b"-"
            while data:
                try:
                    data = await self._loop.sock_recv(source, CHUNK_BYTES)
                except OSError:
                    data = b""  # reset: the other side is told by a close
                wait = self._seconds[host] * (1 + self._jitter * self._random.random())
                await queue.put((self._loop.time() + wait, data))

        async with asyncio.TaskGroup() as reading:
            reading.create_task(read())
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - self._loop.time())
                try:
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    await self._loop.sock_sendall(target, data)
                except OSError:
                    _shut(source)  # this way there is nobody left to read; it also ends `read`
                    while data:
                        _, data = await queue.get()
                    return


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed by its other end already
