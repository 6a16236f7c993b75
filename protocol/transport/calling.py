"""Asking side of `/shoal/call/1`, in the host process: announces a body, sends it when told to, reads the reply.

The trainer keeps the body; its first bytes come with the call, and chunks are pulled from it as fast as the peer takes
them, two ahead. A stream whose call has ended well is kept for the next call to that peer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from . import call_wire, ipc
from .call_wire import CallReason
from .channel import Channel
from .limits import Limits
from .links import Links, UnknownProtocol, Unreachable, parse
from .streams import PeerStream, StreamCut

_MAX_KEPT = 64  # streams for later calls; each costs the peer as much as us
_AHEAD = 2  # chunks asked of the trainer before the first of them is written


class _NotBegun(StreamCut):
    """The stream ended before the peer wanted the body."""


@dataclass
class _Call:
    """A call under way."""

    stream: PeerStream | None = None
    cancelled: bool = False
    chunks: tuple[trio.MemorySendChannel[bytes], trio.MemoryReceiveChannel[bytes]] = field(
        default_factory=lambda: trio.open_memory_channel[bytes](1 + _AHEAD)
    )


class Caller:
    """Calls to other peers."""

    def __init__(self, links: Links, channel: Channel, run_id: str, limits: Limits, nursery: trio.Nursery) -> None:
        self._links = links
        self._channel = channel
        self._run_id = run_id
        self._limits = limits
        self._nursery = nursery
        self._calls: dict[int, _Call] = {}
        self._kept: list[PeerStream] = []  # whose last call has ended well, the latest at the end
        self.bytes_sent = 0

    def on_chunk(self, frame: ipc.CallChunk) -> None:
        call = self._calls.get(frame.id)
        if call is not None and not call.cancelled:
            call.chunks[0].send_nowait(frame.data)

    async def cancel(self, id: int) -> None:
        """The trainer does not wait any more."""
        call = self._calls.get(id)
        if call is not None:
            call.cancelled = True
            call.chunks[0].close()
            if call.stream is not None:
                await call.stream.reset()

    async def run(self, order: ipc.CallStart) -> None:
        """Ends with exactly one CallEnd."""
        call = self._calls[order.id] = _Call()
        if order.head:
            call.chunks[0].send_nowait(order.head)
        try:
            end = await self._call(order, call)
        except UnknownProtocol as error:
            end = ipc.CallEnd(order.id, refused=CallReason.UNKNOWN_PROTOCOL, cause=str(error))
        except (Unreachable, StreamCut) as error:
            end = ipc.CallEnd(order.id, cause=str(error))
        except ValueError as error:
            end = ipc.CallEnd(order.id, refused=CallReason.GARBAGE, cause=str(error))
        finally:
            del self._calls[order.id]
        await self._channel.send(end)

    async def _call(self, order: ipc.CallStart, call: _Call) -> ipc.CallEnd:
        # Without a body it may be handled before we hear of Go, and could not be repeated if we never did.
        kept = self._take_kept(parse(order.addrs)[0]) if order.size else None
        if kept is not None:
            try:
                return await self._converse(kept, order, call)
            except _NotBegun:
                if call.cancelled or kept.expired:
                    raise
        stream = await self._links.open(order.addrs, call_wire.PROTOCOL)
        self._nursery.start_soon(stream.watch)
        return await self._converse(stream, order, call)

    def _take_kept(self, peer_id: str) -> PeerStream | None:
        self._kept = [stream for stream in self._kept if stream.is_open]
        for stream in reversed(self._kept):
            if stream.peer_id == peer_id:
                self._kept.remove(stream)
                return stream
        return None

    async def _keep(self, stream: PeerStream) -> None:
        stream.rest(self._limits.idle_stream_seconds)
        self._kept.append(stream)
        if len(self._kept) > _MAX_KEPT:
            await self._kept.pop(0).close()

    async def _converse(self, stream: PeerStream, order: ipc.CallStart, call: _Call) -> ipc.CallEnd:
        call.stream = stream
        before, in_step, ended = stream.bytes_written, False, False
        try:
            if call.cancelled:
                raise StreamCut("cancelled")
            answer: call_wire.Go | call_wire.Reply | call_wire.Refusal
            answer = await self._ask(stream, order)
            if isinstance(answer, call_wire.Go):
                await self._send_body(stream, order, call)
                answer = call_wire.unpack_outcome(await self._read_answer(stream))
                in_step = True
            ended = True
        finally:
            self.bytes_sent += stream.bytes_written - before
            await (self._keep(stream) if in_step else stream.close() if ended else stream.reset())
        if isinstance(answer, call_wire.Refusal):
            return ipc.CallEnd(order.id, refused=answer.reason, cause=f"{stream.peer_id} answered {answer.reason}")
        assert isinstance(answer, call_wire.Reply)
        return ipc.CallEnd(order.id, reply=answer.body)

    async def _ask(self, stream: PeerStream, order: ipc.CallStart) -> call_wire.Go | call_wire.Refusal:
        opening = call_wire.Opening(self._run_id, order.name, order.size, order.digest)
        try:
            await stream.write(call_wire.pack(opening))
            return call_wire.unpack_permission(await self._read_answer(stream))
        except StreamCut as error:
            raise _NotBegun(str(error)) from error

    async def _send_body(self, stream: PeerStream, order: ipc.CallStart, call: _Call) -> None:
        asked, written = len(order.head), 0
        while written < order.size:
            while asked < order.size and asked - written < _AHEAD * self._limits.chunk_bytes:
                length = min(self._limits.chunk_bytes, order.size - asked)
                await self._channel.send(ipc.CallPull(order.id, asked, length))
                asked += length
            try:
                chunk = await call.chunks[1].receive()
            except trio.EndOfChannel as error:
                raise StreamCut("cancelled") from error
            await stream.write(chunk)
            written += len(chunk)

    async def _read_answer(self, stream: PeerStream) -> bytes:
        patience = self._limits.answer_deadline_seconds + self._limits.read_deadline_seconds
        try:
            return await stream.read_frame(self._limits.max_reply_bytes + call_wire.REPLY_OVERHEAD_BYTES, patience)
        except StreamCut as error:
            raise StreamCut(f"no answer: {error}") from error
