"""Answering side of `/shoal/call/1`, in the host process: admits calls, takes their bodies, returns the replies.

A body's memory is reserved before its caller is told to send it, and a call holds its place until the handler has
answered, even when the caller has left by then: the trainer still holds the body. Whoever answers slowly is thus
`busy` for others rather than out of memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import trio

from . import call_wire, ipc
from .call_wire import CallReason
from .channel import Channel
from .limits import Limits
from .streams import PeerStream, StreamCut

logger = logging.getLogger(__name__)

_Answer = ipc.CallAccept | ipc.CallReply | ipc.CallRefuse


@dataclass
class _Call:
    """A call that holds a place."""

    peer_id: str
    reserved: int = 0  # bytes of its body
    handed_over: bool = False  # the trainer has the whole body, and it lets go of the place
    answers: tuple[trio.MemorySendChannel[_Answer], trio.MemoryReceiveChannel[_Answer]] = field(
        default_factory=lambda: trio.open_memory_channel[_Answer](2)  # CallAccept, and the end
    )


class Receiver:
    """Stream handler plus the trainer's answers."""

    def __init__(self, channel: Channel, run_id: str, limits: Limits, nursery: trio.Nursery) -> None:
        self._channel = channel
        self._run_id = run_id
        self._limits = limits
        self._nursery = nursery
        self._calls: dict[int, _Call] = {}
        self._resting: Counter[str] = Counter()  # streams between two calls, by peer
        self.bytes_received = 0
        self.garbage = 0
        self.cut = 0
        self.refused_busy = 0

    def on_answer(self, frame: _Answer) -> None:
        call = self._calls.get(frame.id)
        if call is None:
            return
        call.answers[0].send_nowait(frame)
        if not isinstance(frame, ipc.CallAccept):
            del self._calls[frame.id]

    async def handle(self, net_stream: Any) -> None:
        """py-libp2p's entry. Whatever the peer does, nothing is raised."""
        stream = PeerStream(net_stream, progress_seconds=self._limits.read_deadline_seconds)
        self._nursery.start_soon(stream.watch)
        while await self._serve(stream) and await self._rest(stream):
            pass
        await stream.close()

    async def _rest(self, stream: PeerStream) -> bool:
        """Wait for the next call on this stream, at no place. Whether there is one."""
        if self._resting[stream.peer_id] >= self._limits.max_received_calls_per_peer:
            return False
        self._resting[stream.peer_id] += 1
        try:
            return await stream.has_more(2 * self._limits.idle_stream_seconds)
        finally:
            self._resting[stream.peer_id] -= 1
            if not self._resting[stream.peer_id]:
                del self._resting[stream.peer_id]

    async def _serve(self, stream: PeerStream) -> bool:
        """One call. Whether another one may follow on the stream."""
        before = stream.bytes_read
        id, call = self._channel.new_id(), _Call(stream.peer_id)
        try:
            if self._is_full_for(stream.peer_id):
                await self._refuse(stream, CallReason.BUSY)
                return False
            self._calls[id] = call
            await self._receive(stream, id, call)
            return call.handed_over
        except StreamCut as error:
            self.cut += 1
            logger.debug("call from %s: %s", stream.peer_id, error)
            await stream.reset()
        except ValueError as error:
            self.garbage += 1
            logger.warning("bad call from %s: %s", stream.peer_id, error)
            await stream.reset()
        finally:
            self.bytes_received += stream.bytes_read - before
            if not call.handed_over:
                self._calls.pop(id, None)
        return False

    def _is_full_for(self, peer_id: str) -> bool:
        own = sum(call.peer_id == peer_id for call in self._calls.values())
        return len(self._calls) >= self._limits.max_received_calls or own >= self._limits.max_received_calls_per_peer

    def _has_room_for(self, peer_id: str, size: int) -> bool:
        """One peer's bodies take one largest body's room: two that send slowly must not shut out the others."""
        total = sum(call.reserved for call in self._calls.values())
        own = sum(call.reserved for call in self._calls.values() if call.peer_id == peer_id)
        return total + size <= self._limits.max_received_call_bytes and own + size <= self._limits.max_call_bytes

    async def _receive(self, stream: PeerStream, id: int, call: _Call) -> None:
        opening = call_wire.unpack_opening(
            await stream.read_frame(self._limits.max_request_bytes, self._limits.read_deadline_seconds)
        )
        if opening.run_id != self._run_id:
            await self._refuse(stream, CallReason.NO_HANDLER)
        elif opening.size > self._limits.max_call_bytes:
            await self._refuse(stream, CallReason.TOO_LARGE)
        elif not self._has_room_for(stream.peer_id, opening.size):
            await self._refuse(stream, CallReason.BUSY)
        else:
            call.reserved = opening.size
            await self._channel.send(ipc.CallOpen(id, stream.peer_id, opening.name, opening.size, opening.digest))
            end: ipc.Frame = ipc.CallCut(id)
            try:
                if await self._go(stream, call):
                    end = ipc.CallWhole(id, await self._take_body(stream, id, opening.size))
                    call.handed_over = True
            finally:
                with trio.CancelScope(shield=True):
                    await self._channel.send(end)
            if call.handed_over:
                await self._reply(stream, call)

    async def _go(self, stream: PeerStream, call: _Call) -> bool:
        """Whether the trainer wants the body; the caller is told."""
        match await self._answer(call):
            case ipc.CallAccept():
                await stream.write(call_wire.pack(call_wire.Go()))
                return True
            case ipc.CallRefuse(reason=reason):
                await self._refuse(stream, reason)
            case None:
                await self._refuse(stream, CallReason.BUSY)
            case ipc.CallReply():
                raise AssertionError("a reply before the body")
        return False

    async def _take_body(self, stream: PeerStream, id: int, size: int) -> bytes:
        """Pass the body on, but for the rest that comes last, which is returned.

        It must make progress, and arrive at a bearable rate: bytes that drip hold memory.
        """
        end = trio.current_time() + self._limits.read_deadline_seconds + size / self._limits.min_call_bytes_per_second
        missing, data = size, b""
        while missing:
            if data:
                await self._channel.send(ipc.CallData(id, data))
            until = min(end, trio.current_time() + self._limits.read_deadline_seconds)
            data = await stream.read(min(missing, self._limits.chunk_bytes), until=until)
            if not data:
                raise StreamCut(f"the body ended {missing} bytes early")
            missing -= len(data)
        return data

    async def _reply(self, stream: PeerStream, call: _Call) -> None:
        match await self._answer(call):
            case ipc.CallReply(body=body):
                await stream.write(call_wire.pack(call_wire.Reply(body)))
            case ipc.CallRefuse(reason=reason):
                self.garbage += reason == CallReason.DIGEST
                await self._refuse(stream, reason)
            case None:
                await self._refuse(stream, CallReason.BUSY)
            case ipc.CallAccept():
                raise AssertionError("accepted twice")

    async def _answer(self, call: _Call) -> _Answer | None:
        """The trainer's next answer; None if it does not come in time."""
        try:
            with trio.fail_after(self._limits.answer_deadline_seconds):
                return await call.answers[1].receive()
        except trio.TooSlowError:
            return None

    async def _refuse(self, stream: PeerStream, reason: str) -> None:
        self.refused_busy += reason == CallReason.BUSY
        await stream.write(call_wire.pack(call_wire.Refusal(reason)))
