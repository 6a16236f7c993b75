"""The host's end of the IPC: one writer task, so that no cancellation can cut a frame in half."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from itertools import count

import trio

from . import ipc

logger = logging.getLogger(__name__)

_QUEUE_FRAMES = 64
_READ_BYTES = 1024 * 1024


class TrainerGone(Exception):
    """The trainer closed its end, or died."""


class Channel:
    """Frames to and from the trainer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._send, self._receive = trio.open_memory_channel[ipc.Frame](_QUEUE_FRAMES)
        self._ids = count(1)

    def new_id(self) -> int:
        """A number for an exchange that the host begins."""
        return next(self._ids)

    async def send(self, frame: ipc.Frame) -> None:
        """Queue a frame; waits while the trainer is slow."""
        await self._send.send(frame)

    async def write_loop(self) -> None:
        """Runs forever; raises TrainerGone."""
        async for frame in self._receive:
            try:
                await self._stream.send_all(ipc.pack(frame))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise TrainerGone from error

    async def commands(self) -> AsyncIterator[ipc.Command]:
        """Frames from the trainer; raises TrainerGone at the end of the stream."""
        splitter = ipc.Splitter()
        while True:
            try:
                data = await self._stream.receive_some(_READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise TrainerGone from error
            if not data:
                raise TrainerGone
            for body in splitter.feed(bytes(data)):
                yield ipc.command_decoder.decode(body)
