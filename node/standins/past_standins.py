"""What an owner published lately: the stand-ins that the sketches coming in now were taken at.

A sketch is under way while its owner publishes on, and its correction is against the stand-in that its composer ran:
`docs/sketches.md`. Kept are states, not objects that move on; copies in 4 bits take half a byte a weight and version.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import copy

from ...kernels.standin import Publisher, StandIn

KEPT = 4  # versions of a slot


class PastStandIns:
    """By slot, the last versions, one stand-in per position. On the training thread."""

    def __init__(self) -> None:
        self._versions: dict[int, deque[list[StandIn]]] = {}

    def note(self, slot: int, publishers: Sequence[Publisher]) -> None:
        """What is published now is the slot's newest version."""
        versions = self._versions.setdefault(slot, deque(maxlen=KEPT))
        versions.append([copy(publisher.published) for publisher in publishers])

    def at(self, slot: int, position: int, age: int) -> StandIn:
        """The stand-in of `age` versions ago; the oldest there is if that is too long ago. KeyError for other slots."""
        versions = self._versions[slot]
        return versions[max(0, len(versions) - 1 - age)][position]

    def forget(self, slot: int) -> None:
        """The slot is not owned any more."""
        self._versions.pop(slot, None)
