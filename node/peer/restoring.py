"""What a peer finds of its own on disk when it starts: the newest checkpoint that its role can go on with.

Both roles keep theirs in one folder, so a directory may hold what the other role left there, of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ...protocol.errors import Refused
from ...protocol.experts.ownership import Copy
from ..learning.composer import Composer
from ..learning.data import Batches
from ..learning.persistence import restore_backbone, saved_slots
from ..logs import get_logger
from ..slots.copies import Snapshot
from ..slots.slot_order import LayerOrder, inverse, renamed
from ..slots.slot_saving import saved_snapshots
from ..standins.saving import SavedStandIns, saved_standins
from ..storage.checkpoint import Checkpoint, CheckpointStore

log = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What a composer's checkpoint holds besides what is in the composer and its batches by now."""

    rounds: list[int]  # per fragment, of its common state
    saved: dict[int, Snapshot]
    standins: dict[int, SavedStandIns]


def restore_composer(
    store: CheckpointStore, composer: Composer, batches: Batches, order: LayerOrder
) -> Restored | None:
    """Put `composer` and `batches` where the newest composer's checkpoint has them; None if there is none."""

    def read(checkpoint: Checkpoint) -> Restored:
        meta, saved = checkpoint.meta, {}
        rounds = [int(number) for number in meta["held"]]
        if len(rounds) != len(composer.fragments):
            raise ValueError(f"it has {len(rounds)} fragments, and the run {len(composer.fragments)}")
        for slot, tensors in saved_slots(checkpoint.tensors).items():
            copy = Copy(int(meta["slots"][str(slot)]), int(meta["step"]))
            places = inverse(order.outward(slot, copy.epoch))
            saved[slot] = Snapshot(copy, renamed(tensors, places))
        standins = saved_standins(checkpoint, composer.menu, composer.shape.num_layers)
        state = meta["batches"]
        restore_backbone(composer, checkpoint.tensors, meta)
        batches.load_state_dict(state)
        log.info("checkpoint.restored", step=composer.step, slots=sorted(saved))
        return Restored(rounds, saved, standins)

    return _newest_that_fits(store, read)


def restore_worker(store: CheckpointStore) -> dict[int, Snapshot]:
    """The slots of the newest worker's checkpoint; none if there is none."""

    def read(checkpoint: Checkpoint) -> dict[int, Snapshot]:
        saved = saved_snapshots(checkpoint)
        log.info("checkpoint.restored", step=checkpoint.step, slots=sorted(saved))
        return saved

    return _newest_that_fits(store, read) or {}


def _newest_that_fits(store: CheckpointStore, read: Callable[[Checkpoint], T]) -> T | None:
    """What `read` makes of the newest checkpoint that it does not refuse."""
    for checkpoint in store.newest():
        try:
            return read(checkpoint)
        except (Refused, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint.skipped", path=str(checkpoint.path), error=repr(error))
    return None
