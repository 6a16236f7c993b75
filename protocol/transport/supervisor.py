"""Keeps a host process running: restarts it with back-off, on the same port, until that is hopeless."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from ..errors import TransportError
from . import ipc
from .process import HostProcess

logger = logging.getLogger(__name__)

_WINDOW_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 5.0
_END_SECONDS = 1.0


class Supervisor:
    """Owns the host process.

    Attributes:
        restarts: how often a host was replaced.
        fatal: set once hosts die faster than `Limits.restarts_per_minute`; from then on `host` raises.
        on_restart: called after every restart.
    """

    def __init__(
        self,
        start: ipc.Start,
        *,
        renew: Callable[[ipc.Start], ipc.Start],
        handle: Callable[[HostProcess, ipc.Event], None],
        lost: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            renew: adds the peers and topics of now to a start order.
            handle: takes every frame of a host, in order.
            lost: called with the reason when a host has died, before the next one starts.
            clock: seconds, monotonic.
        """
        self._start = start
        self._renew = renew
        self._handle = handle
        self._lost = lost
        self._clock = clock
        self._host: HostProcess | None = None
        self._up = asyncio.Event()
        self._reason = ""
        self._deaths: deque[float] = deque()
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0
        self.fatal = asyncio.Event()
        self.on_restart: list[Callable[[], None]] = []
        self.ready: ipc.Ready | None = None

    async def start(self) -> ipc.Ready:
        """Start the first host. Raises TransportError; nothing is left behind then."""
        host, self.ready = await HostProcess.spawn(self._start)
        port = int(self.ready.addrs[0].split("/tcp/")[1].split("/")[0])
        self._start = msgspec.structs.replace(self._start, listen_port=port)
        self._set(host)
        self._task = asyncio.create_task(self._supervise(host))
        self._task.add_done_callback(self._supervised)
        return self.ready

    @property
    def pid(self) -> int | None:
        """Process id of the host that runs now."""
        return self._host.pid if self._host is not None else None

    async def host(self) -> HostProcess:
        """The running host; waits through a restart. Raises TransportError when there will be none."""
        await self._up.wait()
        if self._host is None:
            raise TransportError(f"the py-libp2p host is gone: {self._reason}", fix="restart this peer")
        return self._host

    async def close(self) -> None:
        """End the host. `host` raises from now on."""
        host, self._host = self._host, None
        self._reason = self._reason or "the transport was closed"
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._up.set()
        if host is not None:
            await host.stop()

    def _set(self, host: HostProcess | None) -> None:
        self._host = host
        if host is None:
            self._up.clear()
        else:
            self._up.set()

    async def _supervise(self, host: HostProcess) -> None:
        while True:
            reason = await self._follow(host)
            self._set(None)
            logger.warning("py-libp2p host %d ended: %s", host.pid, reason)
            self._lost(reason)
            replacement = await self._replace(reason)
            if replacement is None:
                return
            host = replacement
            self._set(host)
            self.restarts += 1
            for callback in self.on_restart:
                callback()

    async def _follow(self, host: HostProcess) -> str:
        """Handle the host's frames until it ends; kill it if it falls silent."""
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(host.read(partial(self._handle, host)))
            waiting = group.create_task(host.wait())
            watching = group.create_task(self._watch(host))
            await asyncio.wait((reading, waiting), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():  # it closed the channel, which is the first thing to be seen of its end
                await asyncio.wait((waiting,), timeout=_END_SECONDS)
            watching.cancel()
            if not waiting.done():
                await host.kill()
            if not reading.done():  # a forked child may hold the channel open: read what is left, not what may come
                await asyncio.wait((reading,), timeout=_END_SECONDS)
                reading.cancel()
        return await host.ended()

    async def _watch(self, host: HostProcess) -> None:
        limit = self._start.limits.silence_seconds
        loop = asyncio.get_running_loop()
        strikes = 0
        while strikes < 2:  # the first may be our own event loop's fault
            await asyncio.sleep(limit / 2)
            strikes = strikes + 1 if loop.time() - host.last_heard > limit else 0
        logger.error("py-libp2p host %d is silent: killing it", host.pid)
        await host.kill()

    async def _replace(self, reason: str) -> HostProcess | None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            now = self._clock()
            self._deaths.append(now)
            while self._deaths and now - self._deaths[0] > _WINDOW_SECONDS:
                self._deaths.popleft()
            if len(self._deaths) > self._start.limits.restarts_per_minute:
                self._give_up(f"{len(self._deaths)} failures within a minute, the last: {reason}")
                return None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            try:
                host, self.ready = await HostProcess.spawn(self._renew(self._start))
            except TransportError as error:
                reason = error.cause
                logger.warning("%s", reason)
            else:
                return host

    def _give_up(self, reason: str) -> None:
        logger.error("giving up on the py-libp2p host: %s", reason)
        self._reason = reason
        self._host = None
        self.fatal.set()
        self._up.set()  # whoever waits for a host learns that there is none
        self._lost(reason)

    def _supervised(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # a bug of ours, or a callback's
            logger.error("supervision failed", exc_info=task.exception())
            self._give_up(f"supervision failed: {task.exception()!r}")

    @property
    def reason(self) -> str:
        """Why there is no host, once `fatal` is set or the transport is closed."""
        return self._reason
