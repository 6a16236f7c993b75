"""A libp2p stream with deadlines, made so that a deadline costs this stream only.

Cancelling a trio task inside py-libp2p can stop it after Noise has counted a message and before the socket has sent
it; the peer then fails to decrypt and the whole connection is lost. So nothing here is cancelled: a watchdog resets the
stream, which wakes whoever waits on it; if even the reset cannot be sent, the watchdog closes the socket.
"""

from __future__ import annotations

import math
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError

from .wire import LENGTH_BYTES, body_length

_RESET_SECONDS = 5.0
_CHECK_SECONDS = 1.0
_READ_BYTES = 65_536  # at a time, of frames: what comes with one and belongs to the next is kept
_PART_BYTES = 32_768  # written within a deadline; the peer's window may give way by four times as much at once
_CREDIT_BYTES = 32_768
_OVERDUE = "no progress in time"


class StreamCut(Exception):
    """The stream ended, was reset, or made no progress in time."""


class PeerStream:
    """Wraps a NetStream. `watch` must run in the background while the stream is in use."""

    def __init__(self, stream: Any, *, progress_seconds: float) -> None:
        self._stream = stream
        _give_credit_in_batches(stream.muxed_stream)
        self._progress_seconds = progress_seconds
        self._deadline = math.inf
        self._closed = trio.Event()
        self._ahead = bytearray()  # read from the stream, and not asked for yet
        self.peer_id = str(stream.muxed_conn.peer_id)
        self.bytes_read = 0
        self.bytes_written = 0
        self.expired = False

    @property
    def is_open(self) -> bool:
        """Whether neither side has ended it, as far as is known here."""
        muxed = self._stream.muxed_stream
        ended = muxed.closed or muxed.recv_closed or muxed.conn.event_shutting_down.is_set()
        return not (ended or self._closed.is_set())

    def rest(self, seconds: float) -> None:
        """Nothing is asked of it for now. It is reset if that stays so for so long."""
        self._arm(trio.current_time() + seconds)

    async def watch(self) -> None:
        """Reset the stream when a read or write overstays its deadline. Returns when the stream is closed."""
        while not self._closed.is_set():
            now = trio.current_time()
            if now >= self._deadline:
                self.expired = True
                await self.reset()
                return
            with trio.move_on_after(min(self._deadline - now, _CHECK_SECONDS)):
                await self._closed.wait()

    async def read(self, most: int, *, until: float | None = None) -> bytes:
        """Up to `most` bytes; empty at the end. `until`: a deadline of its own. Raises StreamCut."""
        return self._take(most) if self._ahead else await self._receive(most, until)

    async def read_frame(self, limit: int, seconds: float) -> bytes:
        """Body of one length-prefixed frame. Raises StreamCut, or ValueError if it is longer than `limit`."""
        end = trio.current_time() + seconds  # for the whole frame: bytes that drip do not extend it
        await self._read_ahead(LENGTH_BYTES, end)
        length = body_length(self._take(LENGTH_BYTES), limit)
        await self._read_ahead(length, end)
        return self._take(length)

    async def has_more(self, seconds: float) -> bool:
        """Wait for the peer's next bytes, for so long; False at the end of the stream, however it came."""
        try:
            await self._read_ahead(1, trio.current_time() + seconds)
        except StreamCut:
            return False
        return True

    async def write(self, data: bytes) -> None:
        """Every part of it has a deadline of its own. Raises StreamCut."""
        for start in range(0, len(data), _PART_BYTES):
            self._arm()
            part = data[start : start + _PART_BYTES]
            try:
                await self._stream.write(part)
            except BaseLibp2pError as error:
                raise StreamCut(self._why(error)) from error
            finally:
                self._deadline = math.inf
            self.bytes_written += len(part)

    async def close(self) -> None:
        """Finish writing politely."""
        if not self._closed.is_set():
            self._arm()
            try:
                await self._stream.close()
            except BaseLibp2pError:
                pass  # gone already, which is what was wanted
            finally:
                self._deadline = math.inf
                self._closed.set()

    async def reset(self) -> None:
        """Drop the stream now, in both directions, and wake whoever reads it."""
        self._closed.set()
        muxed = self._stream.muxed_stream
        waiting = muxed.conn.stream_events.get(muxed.stream_id)  # reset() forgets this event without setting it
        with trio.move_on_after(_RESET_SECONDS) as scope:
            await self._stream.reset()
        if scope.cancelled_caught:
            await muxed.conn.secured_conn.close()
        if waiting is not None:
            waiting.set()

    async def _receive(self, most: int, until: float | None) -> bytes:
        self._arm(until)
        try:
            data: bytes = await self._stream.read(most)
        except EOFError:
            return b""
        except BaseLibp2pError as error:
            raise StreamCut(self._why(error)) from error
        finally:
            self._deadline = math.inf
        self.bytes_read += len(data)
        return data

    async def _read_ahead(self, count: int, end: float) -> None:
        """Have so many bytes at hand."""
        while len(self._ahead) < count:
            part = await self._receive(_READ_BYTES, end)
            if not part:
                raise StreamCut("the stream ended inside a frame")
            self._ahead += part

    def _take(self, most: int) -> bytes:
        data = bytes(self._ahead[:most])
        del self._ahead[:most]
        return data

    def _arm(self, until: float | None = None) -> None:
        if self._closed.is_set():
            raise StreamCut(_OVERDUE if self.expired else "the stream is closed")
        self._deadline = trio.current_time() + self._progress_seconds if until is None else until

    def _why(self, error: BaseLibp2pError) -> str:
        if self.expired:
            return _OVERDUE
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _give_credit_in_batches(muxed: Any) -> None:
    """Return a Yamux stream's window to the peer by `_CREDIT_BYTES` or more.

    py-libp2p sends a frame for every read, however few bytes it was. The window is eight times as large at least, so
    that the peer does not wait for what is held back.
    """
    give, owed = muxed._auto_tune_and_send_window_update, 0

    async def give_later(*, bytes_read: int = 0) -> None:
        nonlocal owed
        owed += bytes_read
        if owed >= _CREDIT_BYTES:
            paid, owed = owed, 0
            await give(bytes_read=paid)

    muxed._auto_tune_and_send_window_update = give_later
