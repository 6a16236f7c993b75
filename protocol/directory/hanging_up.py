"""Answering over p2pd's streams without losing the end of the answer: whoever is called lets the caller hang up first.

hivemind closes a stream as soon as its handler has answered. p2pd then shuts the reading half of the stream, and after
that the writing half. If its other copier, which was reading, sees that in between, it resets the whole stream, and
what the caller's p2pd had not handed on yet is gone: the caller sees a stream that ends early, and no error. Hence a
caller counts what it is to receive, then closes, and a reset at that point loses nothing (docs/dependencies.md, trap
18).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

T = TypeVar("T")


async def until_hung_up(answers: AsyncIterator[T], seconds: float) -> AsyncIterator[T]:
    """All of `answers`, then nothing until the caller hangs up: hivemind then cancels the handler, here in its wait.

    A caller that does not hang up is left after `seconds`.
    """
    async for answer in answers:
        yield answer
    await asyncio.sleep(seconds)
