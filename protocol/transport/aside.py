"""Work on bodies that must not hold up the event loop, unless they are small."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_AT_ONCE_BYTES = 65_536  # hashed sooner than a thread has woken up

_T = TypeVar("_T")


async def aside(nbytes: int, work: Callable[[], _T]) -> _T:
    """Result of `work` on so many bytes: from a thread if they are many."""
    return work() if nbytes <= _AT_ONCE_BYTES else await asyncio.to_thread(work)
