"""Resources that several peers fetch at the same time, made once."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable

from ...protocol.transport.downloads import Resource

Make = Callable[[], Awaitable[Resource | None]]


class Shared:
    """Who asks for what is being made, or read by somebody, gets the same: a copy of a slot may be gigabytes.

    Nothing is kept that nobody reads.

    Args:
        seconds: nothing older is given to another peer, however long one reads it.
        clock: monotonic seconds.
    """

    def __init__(self, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._making: dict[Hashable, asyncio.Task[Resource | None]] = {}
        self._made: dict[Hashable, tuple[float, weakref.ref[Resource]]] = {}  # and when it was asked for first

    async def get(self, key: Hashable, make: Make) -> Resource | None:
        """What `make` returns, or has returned for the same key. Its errors are those of all who wait for it."""
        now = self._clock()
        self._made = {k: kept for k, kept in self._made.items() if kept[1]() and now - kept[0] <= self._seconds}
        if key in self._made and (resource := self._made[key][1]()) is not None:
            return resource
        task = self._making.get(key)
        if task is None:
            task = self._making[key] = asyncio.ensure_future(self._make(key, make, now))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
        return await asyncio.shield(task)  # who goes away does not end it for the others

    async def _make(self, key: Hashable, make: Make, now: float) -> Resource | None:
        try:
            resource = await make()
        finally:
            del self._making[key]
        if resource is not None:
            self._made[key] = now, weakref.ref(resource)
        return resource
