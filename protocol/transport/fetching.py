"""Asking side of `/shoal/fetch/1`, in the host process: one stream, from an offset to its end.

Resuming, checking and giving up belong to the trainer's side (fetches.py), which outlives this process.
"""

from __future__ import annotations

import logging

import trio

from . import ipc, wire
from .channel import Channel
from .limits import Limits
from .links import Links, Unreachable
from .streams import PeerStream, StreamCut
from .wire import Reason

logger = logging.getLogger(__name__)

_HEADER_OVERHEAD = 128  # bytes of a Header besides its meta


class _Ended(Exception):
    """The fetch is over without the resource."""

    def __init__(self, reason: Reason, cause: str) -> None:
        super().__init__(cause)
        self.reason = reason


class Fetcher:
    """Fetches under way."""

    def __init__(self, links: Links, channel: Channel, run_id: str, limits: Limits, nursery: trio.Nursery) -> None:
        self._links = links
        self._channel = channel
        self._run_id = run_id
        self._limits = limits
        self._nursery = nursery
        self._streams: dict[int, PeerStream] = {}
        self._cancelled: set[int] = set()
        self._running: set[int] = set()
        self.bytes_received = 0

    async def cancel(self, id: int) -> None:
        """The caller does not wait any more."""
        if id in self._running:
            self._cancelled.add(id)
            if id in self._streams:
                await self._streams[id].reset()

    async def run(self, order: ipc.FetchStart) -> None:
        """Ends with exactly one FetchEnd."""
        self._running.add(order.id)
        try:
            await self._fetch(order)
            end = ipc.FetchEnd(order.id, "", "")
        except _Ended as error:
            end = ipc.FetchEnd(order.id, error.reason, str(error))
        except Unreachable as error:
            end = ipc.FetchEnd(order.id, Reason.UNREACHABLE, str(error))
        except StreamCut as error:
            end = ipc.FetchEnd(order.id, Reason.CUT, str(error))
        except ValueError as error:
            end = ipc.FetchEnd(order.id, Reason.GARBAGE, str(error))
        finally:
            self._running.discard(order.id)
            self._cancelled.discard(order.id)
        await self._channel.send(end)

    async def _fetch(self, order: ipc.FetchStart) -> None:
        stream = await self._links.open(order.addrs, wire.PROTOCOL)
        self._streams[order.id] = stream
        self._nursery.start_soon(stream.watch)
        whole = False
        try:
            if order.id in self._cancelled:
                raise StreamCut("cancelled")
            await stream.write(wire.pack(wire.Request(self._run_id, order.resource, order.offset, order.digest)))
            header = await self._read_header(stream, order)
            await self._channel.send(ipc.FetchHeader(order.id, header.size, header.digest, header.meta, header.offset))
            missing = header.size - header.offset
            while missing:
                data = await stream.read(min(missing, self._limits.chunk_bytes))
                if not data:
                    raise StreamCut(f"the stream ended {missing} bytes early")
                missing -= len(data)
                self.bytes_received += len(data)
                await self._channel.send(ipc.FetchData(order.id, data))
            whole = True
        finally:
            del self._streams[order.id]
            await (stream.close() if whole else stream.reset())

    async def _read_header(self, stream: PeerStream, order: ipc.FetchStart) -> wire.Header:
        try:
            patience = self._limits.serve_deadline_seconds + self._limits.read_deadline_seconds
            body = await stream.read_frame(self._limits.max_meta_bytes + _HEADER_OVERHEAD, patience)
            answer = wire.unpack_answer(body)
        except StreamCut as error:
            raise StreamCut(f"no answer: {error}") from error
        if isinstance(answer, wire.Refusal):
            raise _Ended(answer.reason, f"{stream.peer_id} answered {answer.reason.value}")
        if answer.size > order.max_bytes:
            raise _Ended(Reason.TOO_LARGE, f"{answer.size} bytes, allowed are {order.max_bytes}")
        if answer.offset != (order.offset if answer.digest == order.digest else 0):
            raise ValueError(f"the answer starts at {answer.offset}, asked for {order.offset}")
        return answer
