"""Locks in place of py-libp2p's, which are taken a dozen times for every frame, and next to never held by another task.

`trio.Lock` lets all other tasks run whenever it is taken, free or not: a turn of the event loop, with a system call.
"""

from __future__ import annotations

import trio


class QuickLock:
    """What py-libp2p uses of a `trio.Lock`. To take it when it is free is no checkpoint."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
