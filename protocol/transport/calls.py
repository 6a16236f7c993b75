"""Trainer's side of our calls: keeps the body until the peer has answered, hands out chunks."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from ..errors import PeerUnreachable, Refused
from . import ipc
from .aside import aside
from .call_wire import MAX_CALL_NAME
from .limits import Limits
from .process import HostLost, HostProcess
from .supervisor import Supervisor


@dataclass(frozen=True)
class _Call:
    """A call under way in the host process."""

    body: bytes
    ended: asyncio.Future[ipc.CallEnd]


class Calls:
    """Calls to other peers. A call is made once: what is worth repeating, and when, only its caller knows."""

    def __init__(self, supervisor: Supervisor, limits: Limits, ids: count[int]) -> None:
        self._supervisor = supervisor
        self._limits = limits
        self._ids = ids
        self._calls: dict[int, _Call] = {}
        self._turns = asyncio.Semaphore(limits.max_calls)

    def pull(self, host: HostProcess, frame: ipc.CallPull) -> None:
        call = self._calls.get(frame.id)
        if call is not None:
            host.send(ipc.CallChunk(frame.id, call.body[frame.offset : frame.offset + frame.length]))

    def end(self, frame: ipc.CallEnd) -> None:
        call = self._calls.get(frame.id)
        if call is not None and not call.ended.done():
            call.ended.set_result(frame)

    def host_lost(self) -> None:
        for call in self._calls.values():
            if not call.ended.done():
                call.ended.set_exception(HostLost())

    async def call(self, addrs: Sequence[str], name: str, body: bytes, *, deadline_seconds: float) -> bytes:
        """`Transport.call`."""
        if not 0 < len(name) <= MAX_CALL_NAME:
            raise ValueError(f"a call's name has 1 to {MAX_CALL_NAME} characters")
        if len(body) > self._limits.max_call_bytes:
            raise ValueError(f"{len(body)} bytes do not fit a call of at most {self._limits.max_call_bytes}")
        try:
            async with asyncio.timeout(deadline_seconds), self._turns:
                end = await self._call(list(addrs), name, body)
        except TimeoutError as error:
            raise PeerUnreachable(f"{name!r}: no answer after {deadline_seconds:g} s", fix="allow more time") from error
        if end.refused:
            raise Refused(end.refused, f"{name!r}: {end.cause}")
        if end.cause:
            raise PeerUnreachable(f"{name!r}: {end.cause}")
        return end.reply

    async def _call(self, addrs: list[str], name: str, body: bytes) -> ipc.CallEnd:
        digest = await aside(len(body), lambda: hashlib.sha256(body).digest())
        host = await self._supervisor.host()
        id = next(self._ids)
        call = self._calls[id] = _Call(body, asyncio.get_running_loop().create_future())
        host.send(ipc.CallStart(id, addrs, name, len(body), digest, body[: ipc.MAX_HEAD_BYTES]))
        try:
            return await call.ended
        except asyncio.CancelledError:
            host.send(ipc.CallCancel(id))
            raise
        except HostLost:
            await self._supervisor.host()  # raises if there will be none any more
            return ipc.CallEnd(id, cause="our own host process ended meanwhile")
        finally:
            del self._calls[id]
