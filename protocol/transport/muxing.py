"""Yamux that neither waits for its own answers nor holds what nobody reads.

py-libp2p answers pings and new streams in the task that reads the connection. Once both peers have sent all that the
sockets hold, each one's reader waits for its turn to write, nobody reads, and nothing moves any more: the streams run
out of time, and then the connection is lost with all that was under way. Here a task of its own sends the answers.

It holds whatever a peer sends, also beyond the window that it was given, keeps what came on streams that have been
reset for a minute and a half, and those that were closed here until the peer closes them. Here who sends beyond the
window loses the connection, as it does with other implementations, and what nobody will read is not kept.
"""

from __future__ import annotations

import logging
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux, YamuxStream

logger = logging.getLogger(__name__)

_MAX_ANSWERS = 1024  # waiting; an honest peer has 256 streams unanswered at most. Who has more is not read meanwhile
_MAX_HALF_OPEN = 1024  # streams that were closed here, and not by the peer


class _Unread(bytearray):
    """What came on a stream, and was not read yet. It ends what it is a part of where the peer had no window for it."""

    def __init__(self, muxer: Muxer, stream: YamuxStream) -> None:
        super().__init__()
        self._muxer, self._stream, self._wanted = muxer, stream, True

    def extend(self, data: Any) -> None:
        if len(data) > self._stream.recv_window:
            self._muxer.event_shutting_down.set()
            raise ValueError(f"{len(data)} bytes where {self._stream.recv_window} were allowed")
        if self._wanted:
            super().extend(data)

    def drop(self) -> None:
        """Nobody reads this stream any more: it holds nothing from now on."""
        self._wanted = False
        self.clear()


class _UnreadByStream(dict[int, bytearray]):
    def __init__(self, muxer: Muxer) -> None:
        super().__init__()
        self._muxer = muxer

    def __setitem__(self, id: int, _: bytearray) -> None:
        super().__setitem__(id, _Unread(self._muxer, self._muxer.streams[id]))


class Muxer(Yamux):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stream_buffers = _UnreadByStream(self)
        self._reader: trio.lowlevel.Task | None = None
        self._answers, self._to_answer = trio.open_memory_channel[bytes](_MAX_ANSWERS)
        self._half_open: dict[int, YamuxStream] = {}  # the oldest first

    async def handle_incoming(self) -> None:
        self._reader = trio.lowlevel.current_task()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer)
            await super().handle_incoming()
            nursery.cancel_scope.cancel()  # the connection has ended
        if not self.event_closed.is_set():
            await self._cleanup_on_error()

    async def _write_frame(self, data: bytes) -> None:
        if trio.lowlevel.current_task() is self._reader:
            await self._answers.send(data)
        else:
            await super()._write_frame(data)

    async def _answer(self) -> None:
        async for frame in self._to_answer:
            try:
                await super()._write_frame(frame)
            except Exception as error:  # noqa: BLE001 - many kinds; all mean that the connection is lost
                logger.debug("cannot answer %s: %r", self.peer_id, error)
                await self.secured_conn.close()  # which the reader notices
                return

    async def _finalize_stream(self, stream: YamuxStream, *, fully_closed: bool) -> None:
        """After a stream was closed or reset here; whoever does that has read what it wanted."""
        self._drop(stream)
        if not fully_closed:
            self._half_open[stream.stream_id] = stream
            if len(self._half_open) > _MAX_HALF_OPEN:
                await next(iter(self._half_open.values())).reset()
        await super()._finalize_stream(stream, fully_closed=fully_closed)

    def _finalize_stream_locked(self, stream: YamuxStream, *, fully_closed: bool) -> None:
        if fully_closed:
            self._half_open.pop(stream.stream_id, None)
        if stream.reset_received:
            self._drop(stream)
        super()._finalize_stream_locked(stream, fully_closed=fully_closed)

    def _drop(self, stream: YamuxStream) -> None:
        unread = self.stream_buffers.get(stream.stream_id)
        if isinstance(unread, _Unread):
            unread.drop()


class Muxing(MuxerMultistream):
    """Nothing but Yamux is agreed upon, and each connection gets a `Muxer`: py-libp2p has its own class written in."""

    def __init__(self, *, negotiate_seconds: int) -> None:
        super().__init__({TProtocol(PROTOCOL_ID): Muxer}, negotiate_seconds)

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        await self.select_transport(conn)
        return self._annotate_connection(Muxer(conn, peer_id), conn, TProtocol(PROTOCOL_ID))
