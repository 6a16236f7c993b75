"""One step of a slot, noted while it is taken: what an audit takes again.

Nothing is kept until somebody asks. Then a step is noted from its first sketch on: if sketches wait already, it is the
step after theirs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ...kernels.sketch import RowSketch
from ...kernels.standin import StandIn
from ..slots.slot_state import optimizer_state, weights_as_trained

if TYPE_CHECKING:
    from ..learning.owning import ExpertOwner


@dataclass(frozen=True)
class Used:
    """A sketch that went into a step."""

    sender: str
    step: int
    tokens: int
    sketch: RowSketch
    standin: StandIn  # that it was taken at


@dataclass(frozen=True)
class StepRecord:
    """One step of a slot, by position."""

    step: int
    learning_rate: float
    clip: float
    before: Mapping[int, dict[str, Tensor]]  # masters, optimizer state as `<matrix>.<name>`
    used: Mapping[int, list[Used]]
    after: Mapping[int, dict[str, Tensor]]  # masters


@dataclass
class _Recording:
    positions: tuple[int, ...]
    finish: Callable[[StepRecord | None], None]
    used: dict[int, list[Used]] | None  # None: sketches were waiting already, the step after theirs is recorded
    before: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class StepRecorder:
    """Notes steps of a worker's slots. All on the training thread."""

    def __init__(self) -> None:
        self._open: dict[int, _Recording] = {}  # by slot

    def begin(
        self, slot: int, positions: tuple[int, ...], finish: Callable[[StepRecord | None], None], *, waiting: bool
    ) -> None:
        """Record the next whole step of a slot.

        Args:
            finish: gets the record, or None if there will be none.
            waiting: whether sketches for that step were heard already.
        """
        self._open[slot] = _Recording(positions, finish, None if waiting else defaultdict(list))

    def note(self, slot: int, position: int, used: Used) -> None:
        """A sketch was taken in."""
        recording = self._open.get(slot)
        if recording is not None and recording.used is not None and position in recording.positions:
            recording.used[position].append(used)

    def before_step(self, owner: ExpertOwner, slot: int) -> None:
        """The slot is about to be stepped."""
        recording = self._open.get(slot)
        if recording is not None and recording.used is not None:
            recording.before = {
                position: weights_as_trained(owner, slot, position) | optimizer_state(owner, slot, position)
                for position in recording.positions
            }

    def after_step(self, owner: ExpertOwner, slot: int, *, learning_rate: float, clip: float, sound: bool) -> None:
        """The slot was stepped, or was not, the gradients not being sound."""
        recording = self._open.get(slot)
        if recording is None:
            return
        if recording.used is None or not sound:
            recording.used = defaultdict(list)
            return
        del self._open[slot]
        after = {position: weights_as_trained(owner, slot, position) for position in recording.positions}
        recording.finish(StepRecord(owner.step, learning_rate, clip, recording.before, recording.used, after))

    def forget(self, slot: int) -> None:
        """The slot is let go of, or nobody waits any more."""
        recording = self._open.pop(slot, None)
        if recording is not None:
            recording.finish(None)
