"""Yamux whose reading never waits for its writing.

py-libp2p answers pings and new streams in the task that reads the connection. Once both peers have sent all that the
sockets hold, each one's reader waits for its turn to write, nobody reads, and nothing moves any more: the streams run
out of time, and then the connection is lost with all that was under way.
"""

from __future__ import annotations

import logging
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux

logger = logging.getLogger(__name__)

_MAX_ANSWERS = 1024  # waiting; an honest peer has 256 streams unanswered at most. Who has more is not read meanwhile


class Muxer(Yamux):
    """One connection. What its reader answers is sent by a task of its own, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader: trio.lowlevel.Task | None = None
        self._answers, self._to_answer = trio.open_memory_channel[bytes](_MAX_ANSWERS)

    async def handle_incoming(self) -> None:
        self._reader = trio.lowlevel.current_task()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer)
            await super().handle_incoming()
            nursery.cancel_scope.cancel()  # the connection has ended

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


class Muxing(MuxerMultistream):
    """Nothing but Yamux is agreed upon, and each connection gets a `Muxer`: py-libp2p has its own class written in."""

    def __init__(self, *, negotiate_seconds: int) -> None:
        super().__init__({TProtocol(PROTOCOL_ID): Muxer}, negotiate_seconds)

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        await self.select_transport(conn)
        return self._annotate_connection(Muxer(conn, peer_id), conn, TProtocol(PROTOCOL_ID))
