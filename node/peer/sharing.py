"""What is made for peers that fetch: once for all who ask at the same time, and within a bound of memory."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable

from ...protocol.errors import Refused
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


class Room:
    """Memory for what is made for others, and read by them. Whoever finds none is told to come again.

    One that is alone always has room: whatever a peer holds, others can fetch it, if one at a time.

    Args:
        limit: bytes of all that is there at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._reserved = 0  # of what is being made
        self._made: list[tuple[weakref.ref[Resource], int]] = []  # the last reader may let go of one on any thread

    @property
    def taken(self) -> int:
        """Bytes of what is being made, and of what somebody reads still."""
        self._made = [(kept, size) for kept, size in self._made if kept() is not None]
        return self._reserved + sum(size for _, size in self._made)

    async def fill(self, size: int, make: Make) -> Resource | None:
        """What `make` returns, which takes at most `size` bytes while it is made. Refused if there is no room."""
        taken = self.taken
        if taken and taken + size > self.limit:
            raise Refused("busy", f"{taken} bytes are being served, {size} more are over {self.limit}")
        self._reserved += size
        try:
            resource = await make()
        finally:
            self._reserved -= size
        if resource is not None:
            self._made.append((weakref.ref(resource), len(resource.data)))
        return resource
