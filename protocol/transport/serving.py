"""Server side of `/shoal/fetch/1`, in the host process: admits streams, asks the trainer, pumps bytes.

The trainer keeps the resource; chunks are pulled from it as fast as the peer takes them, two ahead. A slow peer costs
half a megabyte, a place, and the resource's memory unless others read it too; it loses them when it reads too slowly.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import trio

from . import ipc, wire
from .channel import Channel
from .limits import Limits
from .patience import Patience
from .streams import PeerStream, StreamCut
from .wire import Reason

logger = logging.getLogger(__name__)

_AHEAD = 2  # chunks asked of the trainer before the first of them is written
_PATIENCE = 3  # deadlines of a read; the stream's window gives way in steps that take a slow peer most of one


@dataclass
class _Exchange:
    """One served stream, seen from the trainer's side."""

    answer: ipc.ServeOffer | ipc.ServeRefuse | None = None
    answered: trio.Event = field(default_factory=trio.Event)
    chunks: tuple[trio.MemorySendChannel[bytes], trio.MemoryReceiveChannel[bytes]] = field(
        default_factory=lambda: trio.open_memory_channel[bytes](_AHEAD)
    )


class Server:
    """Stream handler plus the trainer's answers."""

    def __init__(self, channel: Channel, run_id: str, limits: Limits, nursery: trio.Nursery) -> None:
        self._channel = channel
        self._run_id = run_id
        self._limits = limits
        self._nursery = nursery
        self._per_peer: Counter[str] = Counter()
        self._exchanges: dict[int, _Exchange] = {}
        self.bytes_sent = 0
        self.garbage = 0
        self.refused_busy = 0

    def on_answer(self, frame: ipc.ServeOffer | ipc.ServeRefuse) -> None:
        exchange = self._exchanges.get(frame.id)
        if exchange is not None:
            exchange.answer = frame
            exchange.answered.set()

    def on_chunk(self, frame: ipc.ServeChunk) -> None:
        exchange = self._exchanges.get(frame.id)
        if exchange is not None:
            exchange.chunks[0].send_nowait(frame.data)

    async def handle(self, net_stream: Any) -> None:
        """py-libp2p's entry. Whatever the peer does, nothing is raised."""
        stream = PeerStream(net_stream, progress_seconds=self._limits.read_deadline_seconds)
        self._nursery.start_soon(stream.watch)
        peer = stream.peer_id
        busy = (
            self._per_peer.total() >= self._limits.max_served_streams
            or self._per_peer[peer] >= self._limits.max_served_streams_per_peer
        )
        try:
            if busy:
                await self._refuse(stream, Reason.BUSY)
                return
            self._per_peer[peer] += 1
            try:
                await self._serve(stream)
            finally:
                self._per_peer[peer] -= 1
                if not self._per_peer[peer]:
                    del self._per_peer[peer]
        except StreamCut as error:
            logger.debug("stream from %s: %s", peer, error)
            await stream.reset()
        except ValueError as error:
            self.garbage += 1
            logger.warning("bad request from %s: %s", peer, error)
            await stream.reset()
        finally:
            self.bytes_sent += stream.bytes_written

    async def _serve(self, stream: PeerStream) -> None:
        request = wire.unpack_request(
            await stream.read_frame(self._limits.max_request_bytes, self._limits.read_deadline_seconds)
        )
        if request.run_id != self._run_id:
            await self._refuse(stream, Reason.NOT_FOUND)
            return
        id, exchange = self._channel.new_id(), _Exchange()
        self._exchanges[id] = exchange
        try:
            await self._channel.send(ipc.ServeRequest(id, stream.peer_id, request.resource))
            with trio.move_on_after(self._limits.serve_deadline_seconds):
                await exchange.answered.wait()
            match exchange.answer:
                case None:
                    await self._refuse(stream, Reason.BUSY)
                case ipc.ServeRefuse(reason=reason):
                    await self._refuse(stream, Reason(reason))
                case ipc.ServeOffer() as offer:
                    await self._pump(stream, request, id, offer, exchange)
        finally:
            del self._exchanges[id]
            with trio.CancelScope(shield=True):
                await self._channel.send(ipc.ServeEnd(id))

    async def _pump(
        self, stream: PeerStream, request: wire.Request, id: int, offer: ipc.ServeOffer, exchange: _Exchange
    ) -> None:
        same = request.digest == offer.digest and request.offset <= offer.size
        start = request.offset if same else 0
        await stream.write(wire.pack(wire.Header(offer.size, start, offer.digest, offer.meta)))
        asked = written = start
        patience = Patience(_PATIENCE * self._limits.read_deadline_seconds, self._limits.min_served_bytes_per_second)
        while written < offer.size:
            while asked < offer.size and asked - written < _AHEAD * self._limits.chunk_bytes:
                length = min(self._limits.chunk_bytes, offer.size - asked)
                await self._channel.send(ipc.ServePull(id, asked, length))
                asked += length
            chunk = await exchange.chunks[1].receive()
            began = trio.current_time()
            await stream.write(chunk)
            written += len(chunk)
            patience.took(len(chunk), trio.current_time() - began)
            if patience.left < 0:
                raise StreamCut("it reads too slowly")
        await stream.close()

    async def _refuse(self, stream: PeerStream, reason: Reason) -> None:
        self.refused_busy += reason is Reason.BUSY
        await stream.write(wire.pack(wire.Refusal(reason)))
        await stream.close()
