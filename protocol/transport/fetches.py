"""Trainer's side of our fetches: starts one, and resumes it through cut streams and host processes that die."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count

from . import ipc
from .downloads import Download, FetchEnded, Resource
from .limits import Limits
from .process import HostLost
from .supervisor import Supervisor
from .wire import MAX_RESOURCE_NAME, Reason

_FIRST_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 1.0
_FRUITLESS_ATTEMPTS = 5
_NEW_BEGINNINGS = 5  # of one fetch: its bytes allow it more time, those that are thrown away too
_RETRIED = {Reason.CUT, Reason.UNREACHABLE}
_LOST = "host-lost"


class Turns:
    """So many at a time for each of any number of peers; nothing is kept of those with whom nothing is under way."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: dict[str, asyncio.Semaphore] = {}
        self._users: Counter[str] = Counter()  # that have their turn or wait for it

    @asynccontextmanager
    async def take(self, peer: str) -> AsyncIterator[None]:
        """Wait for a turn; it is given back as the block ends."""
        free = self._free.setdefault(peer, asyncio.Semaphore(self._most))
        self._users[peer] += 1
        try:
            async with free:
                yield
        finally:
            self._users[peer] -= 1
            if not self._users[peer]:
                del self._users[peer], self._free[peer]


class Fetches:
    """Fetches under way."""

    def __init__(self, supervisor: Supervisor, limits: Limits, ids: count[int]) -> None:
        self._supervisor = supervisor
        self._rate = limits.min_fetch_bytes_per_second
        self._ids = ids
        self._downloads: dict[int, Download] = {}
        self._turns = asyncio.Semaphore(limits.max_fetches)
        self._turns_at = Turns(limits.max_fetches_per_peer)

    def on_frame(self, frame: ipc.FetchHeader | ipc.FetchData | ipc.FetchEnd) -> None:
        if frame.id in self._downloads:
            self._downloads[frame.id].on_frame(frame)

    def host_lost(self, reason: str) -> None:
        for download in self._downloads.values():
            download.end(_LOST, reason)

    async def fetch(
        self,
        addrs: Sequence[str],
        resource: str,
        *,
        deadline_seconds: float,
        max_bytes: int,
        progress: Callable[[int, int], None] | None,
        begun: Download | None,
    ) -> Resource:
        """`Transport.fetch`."""
        if not 0 < len(resource) <= MAX_RESOURCE_NAME:
            raise ValueError(f"a resource name has 1 to {MAX_RESOURCE_NAME} characters")
        download = Download() if begun is None else begun
        download.progress, download.answered = progress, False
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(deadline_seconds) as timeout, self._turns_at.take(_peer_of(addrs)), self._turns:

                def came(nbytes: int) -> None:
                    when = timeout.when()
                    if when is not None and not timeout.expired():
                        timeout.reschedule(when + nbytes / self._rate)

                download.came = came
                return await self._fetch(download, list(addrs), resource, max_bytes, patient=begun is None)
        except TimeoutError as error:
            got = f"{len(download.data)} of {download.size} bytes" if download.started else "no answer"
            raise FetchEnded(
                Reason.DEADLINE, f"{resource!r}: {got} after {clock() - began:.1f} s", fix="allow more time"
            ) from error
        finally:
            download.came = None

    async def _fetch(
        self, download: Download, addrs: list[str], resource: str, max_bytes: int, *, patient: bool
    ) -> Resource:
        """`patient`: a peer that has answered once and cannot be reached now is waited for."""
        pause, fruitless = _FIRST_PAUSE_SECONDS, 0
        most_anew = download.begun_anew + _NEW_BEGINNINGS
        while True:
            before = len(download.data)
            try:
                reason, cause = await self._attempt(download, addrs, resource, max_bytes)
            except HostLost:
                continue
            if not reason:
                found = await download.verified()
                if found is not None:
                    return found
                if not download.resumed or download.begun_anew >= most_anew:
                    raise FetchEnded(Reason.DIGEST, f"{resource!r} is not what its digest says")
                download.restart()  # perhaps a prefix from a peer that lied; once more from the start
                continue
            if reason not in _RETRIED or (not download.answered and reason == Reason.UNREACHABLE):
                raise FetchEnded(Reason(reason), f"{resource!r}: {cause}")
            if download.begun_anew > most_anew:
                raise FetchEnded(Reason(reason), f"{resource!r} is another one at each attempt: {cause}")
            if len(download.data) > before:
                pause, fruitless = _FIRST_PAUSE_SECONDS, 0
            elif reason == Reason.CUT or not patient:
                fruitless += 1
                if fruitless >= _FRUITLESS_ATTEMPTS:
                    raise FetchEnded(Reason(reason), f"{resource!r}: {cause}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    async def _attempt(self, download: Download, addrs: list[str], resource: str, max_bytes: int) -> tuple[str, str]:
        host = await self._supervisor.host()
        id = next(self._ids)
        self._downloads[id] = download
        ended = download.begin_attempt()
        host.send(ipc.FetchStart(id, addrs, resource, len(download.data), download.digest, max_bytes))
        try:
            reason, cause = await ended
        except asyncio.CancelledError:
            host.send(ipc.FetchCancel(id))
            raise
        finally:
            del self._downloads[id]
        if reason == _LOST:
            raise HostLost
        return reason, cause


def _peer_of(addrs: Sequence[str]) -> str:
    """The peer id that its addresses end in; whether they are any is for the host process to find out."""
    return addrs[0].rpartition("/p2p/")[2] if addrs else ""
