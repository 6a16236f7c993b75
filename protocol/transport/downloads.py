"""What the trainer keeps of a fetch while host processes and streams come and go."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import FetchFailed
from . import ipc
from .wire import Reason


class FetchEnded(FetchFailed):
    """A fetch failed; `reason` says how."""

    def __init__(self, reason: Reason, cause: str, *, fix: str = "") -> None:
        super().__init__(cause, fix=fix)
        self.reason = reason


@dataclass(frozen=True)
class FetchQuery:
    """What a peer asks for."""

    peer_id: str  # authenticated by Noise
    resource: str


@dataclass(frozen=True)
class Resource:
    """Bytes that peers can fetch, and a little about them. Serve the same object again and it is hashed once.

    Attributes:
        on_read: called whenever a peer that fetches it takes a part.
    """

    data: bytes
    meta: bytes = b""
    on_read: Callable[[], None] | None = field(default=None, compare=False)

    @cached_property
    def digest(self) -> bytes:
        """sha256 of `data`."""
        return hashlib.sha256(self.data).digest()


@dataclass
class Download:
    """What has come of one resource. Bytes are appended only in order: `data` is a prefix of what `digest` names.

    One that was not finished can be gone on with at another peer, which sends the rest if it has the same resource.
    """

    progress: Callable[[int, int], None] | None = None
    came: Callable[[int], None] | None = None  # told of bytes as they come
    data: bytearray = field(default_factory=bytearray)
    digest: bytes = b""
    meta: bytes = b""
    size: int = -1
    resumed: bool = False
    begun_anew: int = 0  # times that what had come was of no use
    answered: bool = False  # the peer that is asked now has sent a header
    ended: asyncio.Future[tuple[str, str]] | None = None

    @property
    def started(self) -> bool:
        """Whether a header has ever come, from any peer."""
        return self.size >= 0

    def begin_attempt(self) -> asyncio.Future[tuple[str, str]]:
        """Future of (reason, cause), reason empty when all bytes came."""
        self.ended = asyncio.get_running_loop().create_future()
        return self.ended

    def on_frame(self, frame: ipc.FetchHeader | ipc.FetchData | ipc.FetchEnd) -> None:
        """The host's answers, in order."""
        match frame:
            case ipc.FetchHeader():
                self.resumed, self.answered = frame.offset > 0, True
                if not self.resumed:
                    self.begun_anew += bool(self.data)
                    self.data.clear()
                self.digest, self.meta, self.size = frame.digest, frame.meta, frame.size
            case ipc.FetchData():
                self.data += frame.data
                if self.came is not None:
                    self.came(len(frame.data))
                if self.progress is not None:
                    self.progress(len(self.data), self.size)
            case ipc.FetchEnd():
                self.end(frame.reason, frame.cause)

    def end(self, reason: str, cause: str) -> None:
        if self.ended is not None and not self.ended.done():
            self.ended.set_result((reason, cause))

    def restart(self) -> None:
        """Forget everything."""
        self.begun_anew += 1
        self.data.clear()
        self.digest, self.size = b"", -1

    async def verified(self) -> Resource | None:
        """The resource if its digest is right, else None."""
        resource = Resource(bytes(self.data), self.meta)
        found = await asyncio.to_thread(lambda: resource.digest)
        return resource if found == self.digest and len(resource.data) == self.size else None
