"""Copies of slots that are kept for their owners, on disk, and what a peer's own checkpoint had of slots."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...protocol import messages
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused, TransportError
from ...protocol.experts.ownership import Copy
from ...protocol.messages import SlotState, StandInSnapshot
from ...protocol.transport.downloads import FetchEnded
from ...protocol.transport.wire import Reason
from ..logs import get_logger
from ..storage.blobs import from_bytes
from .copy_file import lease_of, read_copy, write_copy
from .slot_state import SlotTensors

log = get_logger(__name__)

RETRY_SECONDS = 1.0  # after an attempt that failed
DISK_RETRY_SECONDS = 60.0  # after one that came and could not be written: to fetch it again costs its holder as much
READ_BYTES_PER_SECOND = 1 << 20  # of a slot: who waits for its holder thinks that others read as fast


@dataclass(frozen=True)
class Snapshot:
    """One slot's state: what it stands for, its tensors in the wire's order, and what had been published by then."""

    copy: Copy
    tensors: SlotTensors
    published: StandInSnapshot | None = None


def pause_after(error: Exception) -> float:
    """Seconds until what failed so is tried again: longer if it was the disk, which is what other OSErrors tell of."""
    network = isinstance(error, TimeoutError | ConnectionError)
    return DISK_RETRY_SECONDS if isinstance(error, OSError) and not network else RETRY_SECONDS


def opened(data: bytes, what: str, epoch: int | None = None) -> Snapshot:
    """A slot's state as it came from a peer.

    Raises:
        Refused: it is malformed, not finite, or of another lease than that of `epoch`.
    """
    state = messages.decode(data, SlotState)
    if epoch not in (None, state.epoch):
        raise Refused("stale", f"{what} is of epoch {state.epoch}, to be had at {epoch}")
    return Snapshot(Copy(state.epoch, state.version), from_bytes(state.tensors, what=what), state.standin)


async def copy_from(
    sources: Sequence[str], fetch: Callable[[str], Awaitable[Snapshot]], *, slot: int, seconds: float
) -> Snapshot | None:
    """The first copy that one of `sources` gives; None if none has one.

    Those that are busy are asked again for so many seconds: without a copy the slot's learning is lost.
    """
    loop = asyncio.get_running_loop()
    deadline, left = loop.time() + seconds, list(sources)
    while left:
        busy = []
        for peer in left:
            try:
                return await fetch(peer)
            except (FetchFailed, PeerUnreachable, Refused) as error:
                log.info("slot.no_copy_at", slot=slot, peer=peer, error=str(error))
                if isinstance(error, FetchEnded) and error.reason is Reason.BUSY:
                    busy.append(peer)
        left = busy if loop.time() < deadline else []
        if left:
            await asyncio.sleep(RETRY_SECONDS)
    return None


async def newer_than(
    own: Snapshot, sources: Sequence[str], fetch: Callable[[str], Awaitable[Snapshot]], *, slot: int, seconds: float
) -> Snapshot:
    """What one of `sources` has kept of a slot later than `own` was written down, in the same lease; else `own`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for peer in sources:
                try:
                    found = await fetch(peer)
                except (FetchFailed, PeerUnreachable, Refused) as error:
                    log.info("slot.no_copy_at", slot=slot, peer=peer, error=str(error))
                    continue
                if found.copy.epoch == own.copy.epoch and found.copy.version > own.copy.version:
                    log.info("slot.newer_copy", slot=slot, peer=peer, copy=str(found.copy), own=str(own.copy))
                    return found
    return own


class CopyStore:
    """Copies by slot: those that this peer fetched, also before it was restarted, and those in its checkpoint.

    Args:
        folder: where they are kept; made if missing.
        saved: slots found in this peer's checkpoint. Of two states of a slot the newer is held.
    """

    def __init__(self, folder: Path, saved: Mapping[int, Snapshot]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.partial"):
            _remove(left)
        self._stores = itertools.count()
        self._saved = dict(saved)
        self._refreshing: dict[int, asyncio.Task[None]] = {}
        self.held: dict[int, Copy] = {slot: replace(snapshot.copy, mine=True) for slot, snapshot in saved.items()}
        for path in folder.glob("slot-*.safetensors"):
            self._find(path)

    def _find(self, path: Path) -> None:
        """Hold the copy in a file of before a restart, or clear the file away."""
        try:
            slot, copy = int(path.stem.removeprefix("slot-")), lease_of(path)
        except (Refused, ValueError) as error:
            log.warning("slot.copy_damaged", file=path.name, error=str(error))
            _remove(path)
            return
        except OSError as error:  # perhaps the next start can
            log.warning("slot.copy_not_read", file=path.name, error=str(error))
            return
        held = self.held.get(slot)
        if held is not None and (held.epoch, held.version) >= (copy.epoch, copy.version):
            _remove(path)
            return
        self._saved.pop(slot, None)
        self.held[slot] = copy

    def refresh(self, slot: int, fetch: Callable[[], Awaitable[Snapshot]]) -> None:
        """Fetch a newer copy and keep it, beside whatever else happens to the slot. Nothing if that is under way."""
        if slot not in self._refreshing:
            self._refreshing[slot] = asyncio.create_task(self._refresh(slot, fetch))

    async def _refresh(self, slot: int, fetch: Callable[[], Awaitable[Snapshot]]) -> None:
        try:
            if not await self.store(slot, await fetch()):
                await asyncio.sleep(DISK_RETRY_SECONDS)
        except (FetchFailed, PeerUnreachable, Refused, TransportError, ValueError, OSError) as error:
            log.warning("slot.copy_failed", slot=slot, error=str(error))
            await asyncio.sleep(RETRY_SECONDS)  # under way still: every bit of news would try it again
        finally:
            if self._refreshing.get(slot) is asyncio.current_task():
                del self._refreshing[slot]

    def stop_refreshing(self, slot: int) -> None:
        """An owner that is gone must not keep the copy that there is from being used."""
        task = self._refreshing.pop(slot, None)
        if task is not None:
            task.cancel()

    async def store(self, slot: int, snapshot: Snapshot) -> bool:
        """Keep a copy, in place of an older one. Whether it could be written; if not, the older one stays."""
        path = self._path(slot)
        # A name of its own: a write whose task was cancelled goes on in its thread.
        partial = path.with_suffix(f".{next(self._stores)}.partial")
        writing = asyncio.get_running_loop().run_in_executor(
            None, write_copy, partial, snapshot.copy, snapshot.tensors, snapshot.published
        )
        try:
            await asyncio.shield(writing)
            partial.replace(path)
        except OSError as error:
            log.warning("slot.copy_not_written", slot=slot, folder=str(self._folder), error=str(error))
            return False
        finally:
            # A full disk is tried again and again: half-written ones would keep it full.
            if writing.done():
                _remove(partial)
            else:
                writing.add_done_callback(lambda _: _remove(partial))
        self._saved.pop(slot, None)
        self.held[slot] = snapshot.copy
        return True

    async def load(self, slot: int) -> Snapshot:
        """A copy that is held. Refused or OSError if it is damaged, Refused if it was replaced meanwhile."""
        copy = self.held[slot]
        if slot in self._saved:
            return self._saved[slot]
        tensors, published = await asyncio.to_thread(read_copy, self._path(slot))
        if self.held.get(slot) is not copy:  # the file may be the new one, whose experts are in another order
            raise Refused("replaced", f"the copy of slot {slot} has just been replaced")
        return Snapshot(copy, tensors, published)

    async def load_or_drop(self, slot: int) -> Snapshot | None:
        """A copy that is held; None, and it is dropped, if it is damaged."""
        try:
            return await self.load(slot)
        except (Refused, OSError) as error:
            log.error("slot.copy_damaged", slot=slot, error=str(error))
            self.drop(slot)
            return None

    def set_aside(self, slot: int) -> None:
        """Forget a copy, if there is one, and one that is on its way, as the slot is owned now.

        On disk it stays: the next checkpoint with the slot may never be written.
        """
        self.stop_refreshing(slot)
        self.held.pop(slot, None)
        self._saved.pop(slot, None)

    def drop(self, slot: int) -> None:
        """Forget a copy, on disk too, if there is one, and one that is on its way."""
        self.set_aside(slot)
        _remove(self._path(slot))

    def _path(self, slot: int) -> Path:
        return self._folder / f"slot-{slot}.safetensors"


def _remove(path: Path) -> None:
    """If it is there, and the disk lets it: after errors, disks are mounted so that they can only be read."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("slot.copy_not_removed", file=path.name, error=str(error))
