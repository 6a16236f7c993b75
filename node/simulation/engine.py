"""A virtual clock with a queue of what is to happen, and a trace of what did."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from ...protocol.errors import ShoalError

TRACED = 60  # events shown with an error


class BrokenInvariant(ShoalError):
    """What must never happen has happened in a simulation: a flaw in the decisions, or in the simulator."""

    code = "SHOAL-260"


class Engine:
    """Runs actions in the order of their times; those of one time in the order in which they were asked for.

    Attributes:
        now: seconds since the simulated run began.
        seed: of all randomness; each user draws from a generator of its own, `rng(name)`.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.seed = seed
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._trace: deque[str] = deque(maxlen=TRACED)
        self._history = hashlib.sha256()

    def rng(self, name: str) -> random.Random:
        """The generator that belongs to `name`: what others draw does not change it."""
        return random.Random(f"{self.seed}/{name}")

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` at a time, now at the earliest."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), action, args))

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` so much later."""
        self.at(self.now + seconds, action, *args)

    def run(self, until: float) -> None:
        """Until that time, or until nothing is left to happen."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action, args = heapq.heappop(self._queue)
            action(*args)
        self.now = max(self.now, until)

    def note(self, event: str, **fields: object) -> None:
        """Something worth telling has happened."""
        told = " ".join([f"{self.now:10.3f} {event}", *(f"{name}={value}" for name, value in fields.items())])
        self._trace.append(told)
        self._history.update(told.encode() + b"\n")

    @property
    def fingerprint(self) -> str:
        """Of everything noted so far: equal histories have equal ones."""
        return self._history.hexdigest()[:16]

    def require(self, holds: bool, invariant: str) -> None:
        """Raise BrokenInvariant, with the last events, unless it holds."""
        if not holds:
            trace = "\n".join(self._trace)
            raise BrokenInvariant(
                f"at {self.now:.3f} s, seed {self.seed}: {invariant}\n{trace}",
                fix="report it with the command that you ran; the same seed shows it again",
            )
