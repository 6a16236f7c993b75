"""Received gossip on its way to the trainer: bounded, oldest dropped first, every drop counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from . import ipc
from .limits import Limits


@dataclass
class GossipCounts:
    """Totals for ipc.Counters."""

    bytes_sent: int = 0
    bytes_received: int = 0
    dropped_in: int = 0
    dropped_out: int = 0
    garbage: int = 0


class Inbox:
    """Received messages of one topic, on their way to the trainer: oldest dropped first when the trainer is slow."""

    def __init__(self, topic: str, limits: Limits, counts: GossipCounts) -> None:
        self._topic = topic
        self._limits = limits
        self._counts = counts
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._credit = limits.gossip_window
        self._changed = trio.Event()

    def put(self, sender: str, data: bytes) -> None:
        """Never waits."""
        self._waiting.append((sender, data))
        self._bytes += len(data)
        while len(self._waiting) > self._limits.gossip_queue_messages or self._bytes > self._limits.gossip_queue_bytes:
            _, dropped = self._waiting.popleft()
            self._bytes -= len(dropped)
            self._counts.dropped_in += 1
        self._changed.set()

    def taken(self) -> None:
        """The trainer's handler has finished a message."""
        self._credit += 1
        self._changed.set()

    async def deliver(self, send: Callable[[ipc.Frame], Awaitable[None]]) -> None:
        """Hand messages over, at most a window ahead of the handler. Runs forever."""
        while True:
            while self._waiting and self._credit > 0:
                sender, data = self._waiting.popleft()
                self._bytes -= len(data)
                self._credit -= 1
                await send(ipc.Gossip(self._topic, sender, data))
            self._changed = trio.Event()
            await self._changed.wait()
