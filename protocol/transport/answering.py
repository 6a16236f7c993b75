"""Trainer's side of serving: asks the handler, keeps the resource while a peer reads it, hands out chunks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ..errors import ShoalError
from . import ipc
from .downloads import FetchQuery, Resource
from .limits import Limits
from .process import HostProcess
from .wire import Reason

logger = logging.getLogger(__name__)

ServeHandler = Callable[[FetchQuery], Awaitable[Resource | None]]


class Answerer:
    """Exchanges of one host process at a time; their numbers are that process's own."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[int, Resource | None] = {}  # None: the handler is still at it
        self.handler: ServeHandler | None = None

    def clear(self) -> None:
        """The host process is gone, and with it every exchange."""
        self._open = {}

    def begin(self, host: HostProcess, request: ipc.ServeRequest) -> Awaitable[None]:
        """Register a request; the returned work answers it."""
        self._open[request.id] = None
        return self._answer(host, request, self._open)

    def pull(self, host: HostProcess, frame: ipc.ServePull) -> None:
        resource = self._open.get(frame.id)
        if resource is not None:
            if resource.on_read is not None:
                resource.on_read()
            host.send(ipc.ServeChunk(frame.id, resource.data[frame.offset : frame.offset + frame.length]))

    def end(self, frame: ipc.ServeEnd) -> None:
        self._open.pop(frame.id, None)

    async def _answer(self, host: HostProcess, request: ipc.ServeRequest, mine: dict[int, Resource | None]) -> None:
        found = await self._find(request)
        if isinstance(found, Reason):
            host.send(ipc.ServeRefuse(request.id, found))
            return
        digest = await asyncio.to_thread(lambda: found.digest)
        if request.id in mine:  # else the peer has left, or the host has
            mine[request.id] = found
            host.send(ipc.ServeOffer(request.id, len(found.data), digest, found.meta))

    async def _find(self, request: ipc.ServeRequest) -> Resource | Reason:
        if self.handler is None:
            return Reason.NOT_FOUND
        try:
            found = await self.handler(FetchQuery(request.peer_id, request.resource))
        except ShoalError as error:
            logger.info("refused %r to %s: %s", request.resource, request.peer_id, error.cause)
            return Reason.BUSY
        except Exception:  # a bug in the handler must not look like an absent resource
            logger.exception("the handler failed on %r", request.resource)
            return Reason.BUSY
        if found is not None and len(found.meta) > self._limits.max_meta_bytes:
            logger.error("meta of %r is over %d bytes: not served", request.resource, self._limits.max_meta_bytes)
            return Reason.NOT_FOUND
        return Reason.NOT_FOUND if found is None else found
