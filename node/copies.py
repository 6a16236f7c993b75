"""Copies of slots that are kept for their owners, on disk, and what a peer's own checkpoint had of slots."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..protocol.errors import Refused
from ..protocol.messages import StandInSnapshot
from ..protocol.ownership import Copy
from .blobs import from_bytes, to_bytes
from .owning import SlotTensors


@dataclass(frozen=True)
class Snapshot:
    """One slot's state: what it stands for, its tensors in the wire's order, and what had been published by then."""

    copy: Copy
    tensors: SlotTensors
    published: StandInSnapshot | None = None


class CopyStore:
    """Copies by slot.

    Args:
        folder: where they are kept; made if missing.
        saved: slots found in this peer's checkpoint.
    """

    def __init__(self, folder: Path, saved: Mapping[int, Snapshot]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._saved = dict(saved)
        self._published: dict[int, StandInSnapshot] = {}
        self.held: dict[int, Copy] = {slot: snapshot.copy for slot, snapshot in saved.items()}

    async def store(self, slot: int, snapshot: Snapshot) -> None:
        """Keep a copy, in place of an older one."""
        path = self._path(slot)
        partial = path.with_suffix(".partial")
        await asyncio.to_thread(lambda: partial.write_bytes(to_bytes(snapshot.tensors)))
        partial.replace(path)
        self._saved.pop(slot, None)
        self.held[slot] = snapshot.copy
        if snapshot.published is not None:
            self._published[slot] = snapshot.published

    async def load(self, slot: int) -> Snapshot:
        """A copy that is held. Refused or OSError if it is damaged, Refused if it was replaced meanwhile."""
        copy, published = self.held[slot], self._published.get(slot)
        if slot in self._saved:
            return self._saved[slot]
        path = self._path(slot)
        tensors = await asyncio.to_thread(lambda: from_bytes(path.read_bytes(), what=f"copy of slot {slot}"))
        if self.held.get(slot) is not copy:  # the file may be the new one, whose experts are in another order
            raise Refused("replaced", f"the copy of slot {slot} has just been replaced")
        return Snapshot(copy, tensors, published)

    def drop(self, slot: int) -> None:
        """Forget a copy, if there is one."""
        self.held.pop(slot, None)
        self._saved.pop(slot, None)
        self._published.pop(slot, None)
        self._path(slot).unlink(missing_ok=True)

    def _path(self, slot: int) -> Path:
        return self._folder / f"slot-{slot}.safetensors"
