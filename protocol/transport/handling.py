"""Trainer's side of peers' calls: collects a body, checks it, asks the handler, answers.

Every call that has come whole is answered exactly once, whatever the handler does, as it holds a place and memory in
the host process's account until then.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ..errors import Refused
from . import ipc
from .aside import aside
from .call_wire import CallReason, is_reason
from .limits import Limits
from .process import HostProcess

logger = logging.getLogger(__name__)

CallHandler = Callable[[str, str, bytes], Awaitable[bytes]]
"""(peer id of the caller, authenticated by Noise; name; body) -> body of the reply."""

CallAdmission = Callable[[str, str, int], None]
"""(peer id, name, bytes of the body), before the body is read. Raises Refused."""


@dataclass
class _Call:
    """A call whose body is on its way."""

    opening: ipc.CallOpen
    chunks: list[bytes] = field(default_factory=list)


class CallHandling:
    """Calls from one host process at a time; their numbers are that process's own."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._calls: dict[int, _Call] = {}
        self.handler: CallHandler | None = None
        self.admit: CallAdmission | None = None

    def clear(self) -> None:
        """The host process is gone, and with it every body that was on its way."""
        self._calls = {}

    def begin(self, host: HostProcess, frame: ipc.CallOpen) -> None:
        if self.handler is None:
            host.send(ipc.CallRefuse(frame.id, CallReason.NO_HANDLER))
            return
        try:
            if self.admit is not None:
                self.admit(frame.peer_id, frame.name, frame.size)
        except Refused as error:
            host.send(ipc.CallRefuse(frame.id, _reason(frame, error)))
            return
        except Exception:  # as with the handler
            logger.exception("cannot decide whether to admit the call %r", frame.name)
            host.send(ipc.CallRefuse(frame.id, CallReason.FAILED))
            return
        self._calls[frame.id] = _Call(frame)
        host.send(ipc.CallAccept(frame.id))

    def add(self, frame: ipc.CallData) -> None:
        self._calls[frame.id].chunks.append(frame.data)

    def cut(self, frame: ipc.CallCut) -> None:
        self._calls.pop(frame.id, None)

    def answer(self, host: HostProcess, frame: ipc.CallWhole) -> Awaitable[None]:
        """Take the call over; the returned work answers it."""
        call = self._calls.pop(frame.id)
        call.chunks.append(frame.data)
        return self._answer(host, call)

    async def _answer(self, host: HostProcess, call: _Call) -> None:
        id = call.opening.id
        reply: bytes | str = CallReason.FAILED  # should this task, or what the handler waits for, be cancelled
        try:
            body = await aside(call.opening.size, lambda: _checked(call))
            reply = CallReason.DIGEST if body is None else await self._ask(call.opening, body)
        finally:
            host.send(ipc.CallRefuse(id, reply) if isinstance(reply, str) else ipc.CallReply(id, reply))

    async def _ask(self, opening: ipc.CallOpen, body: bytes) -> bytes | str:
        """The handler's reply, or why there is none."""
        assert self.handler is not None
        try:
            reply = await self.handler(opening.peer_id, opening.name, body)
        except Refused as error:
            return _reason(opening, error)
        except Exception:  # a bug that one call provokes must not cost the others
            logger.exception("the handler failed on the call %r", opening.name)
            return CallReason.FAILED
        if len(reply) > self._limits.max_reply_bytes:
            logger.error("a reply to %r of %d bytes is over %d", opening.name, len(reply), self._limits.max_reply_bytes)
            return CallReason.FAILED
        return reply


def _reason(opening: ipc.CallOpen, error: Refused) -> str:
    logger.info("refused the call %r of %s: %s", opening.name, opening.peer_id, error.cause)
    if is_reason(error.reason):
        return error.reason
    logger.error("%r is no reason to refuse a call with", error.reason)
    return CallReason.FAILED


def _checked(call: _Call) -> bytes | None:
    """The body, if it is the one announced. The chunks are let go."""
    body = b"".join(call.chunks)
    call.chunks.clear()
    return body if hashlib.sha256(body).digest() == call.opening.digest else None
