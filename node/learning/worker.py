"""The worker: owns experts, sees no data. It steps them on what composers' sketches say, and nothing else.

Its positions are in the order of handles; it does not know which layer an expert belongs to.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.bases import Bases
from ...kernels.experts import DenseExpert, OwnedExpert
from ...kernels.standin import StandIn
from ..audits.step_record import StepRecord
from ..run.manifest import Manifest
from ..sketches.sketching import Sketch
from ..standins.standin_menu import menu_of
from .expert_mode import ExpertMode
from .optimizer import make_optimizer, set_rate
from .owning import ExpertOwner

CLIP_EPSILON = 1e-6  # of torch's clip_grad_norm_


@dataclass(frozen=True)
class WorkReport:
    """One step of a worker: the slots stepped, the tokens that their sketches stand for, the rows seen."""

    slots: tuple[int, ...]
    tokens: float
    rows: int
    seconds: float
    skipped: bool = False  # gradients were not finite


@dataclass
class _Waiting:
    """What has come for one slot since its last step."""

    since: float  # monotonic seconds, of the first
    senders: set[str]
    rows: int = 0
    tokens: float = 0
    complete: bool = False  # nothing more is to come: it was a mean over all composers


class Worker(ExpertOwner):
    """Experts that live on sketches.

    Args:
        composers: those that train or have finished, and the steps they say they are at. A slot is stepped as soon as
            it has heard all that are not done.
        device: to keep and train experts on.
        clock: monotonic seconds.
        bases: of shared stand-ins.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        composers: Callable[[], Mapping[str, int]],
        device: torch.device | str = "cpu",
        fit_seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        mode: ExpertMode | None = None,
        bases: Bases | None = None,
    ) -> None:
        super().__init__(manifest, fit_seed=fit_seed, mode=mode)
        self.menu = menu_of(manifest.standin, self.shape.hidden, self.shape.width, bases or Bases())
        self._composers, self._clock = composers, clock
        self.device = torch.device(device)
        self.optimizer = make_optimizer(self.train, {})
        self._experts: dict[int, list[OwnedExpert]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._told: dict[str, int] = {}  # by sender, the step of its last sketch
        self.slot_steps: dict[int, int] = {}  # by slot, the composers' step that it was last stepped for

    def hear(
        self, sender: str, slot: int, sketches: Mapping[int, Sketch], *, tokens: int, step: int, age: int = 0
    ) -> None:
        super().hear(sender, slot, sketches, tokens=tokens, step=step, age=age)
        waiting = self._waiting.setdefault(slot, _Waiting(self._clock(), set()))
        waiting.senders.add(sender)
        waiting.rows += sum(sketch.num_rows for sketch in sketches.values())
        waiting.tokens += tokens
        self._told[sender] = step
        self._follow()

    def hear_mean(
        self, sender: str, slot: int, gradients: Mapping[int, tuple[Tensor, Tensor]], *, tokens: float, step: int
    ) -> None:
        super().hear_mean(sender, slot, gradients, tokens=tokens, step=step)
        waiting = self._waiting.setdefault(slot, _Waiting(self._clock(), set()))
        waiting.tokens += tokens
        waiting.complete = True
        self._told[sender] = step
        self._follow()

    @property
    def shared_steps(self) -> int:
        """One: it has no tokens of its own to learn from meanwhile, and steps when it is told something."""
        return 1

    def record_step(self, slot: int, positions: tuple[int, ...], finish: Callable[[StepRecord | None], None]) -> None:
        """Put the next whole step of an owned slot's experts on file."""
        self.recorder.begin(slot, positions, finish, waiting=any(of == slot for of, _ in self._sums))

    def _steps(self) -> dict[str, int]:
        """Where each composer is: as its record says, which may be seconds old, or its sketches."""
        return {peer: max(step, self._told.get(peer, 0)) for peer, step in self._composers().items()}

    def _follow(self) -> None:
        """The schedule is at the composers' lower median step: one that lies about its own does not move it."""
        steps = self._steps()
        self._told = {peer: step for peer, step in self._told.items() if peer in steps}
        if steps:
            self.step = max(self.step, min(statistics.median_low(steps.values()), self.train.steps))

    def ready(self) -> list[int]:
        """Slots to step now: all composers were heard, or those that are missing have been waited for long enough."""
        now, missing = self._clock(), {peer for peer, step in self._steps().items() if step < self.train.steps}
        patience = self.manifest.sketch.patience_seconds
        return [
            slot
            for slot, waiting in self._waiting.items()
            if slot not in self._frozen
            and (waiting.complete or missing <= waiting.senders or now - waiting.since > patience)
        ]

    def has_work(self) -> bool:
        return bool(self.ready())

    def train_step(self) -> WorkReport:
        """Step every slot that is ready."""
        began = time.perf_counter()
        slots = self.ready()
        heard = [self._waiting.pop(slot) for slot in slots]
        lr = self.learning_rate()
        set_rate(self.optimizer, lr)
        self._set_gradients(0, slots)
        stepped = [t for slot in slots for expert in self.experts_of(slot) for t in expert.trained]
        norm = torch.nn.utils.clip_grad_norm_(stepped, self.train.grad_clip)
        sound = math.isfinite(norm.item())
        for slot in slots:
            self.recorder.before_step(self, slot)
        if sound:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clip = min(1.0, self.train.grad_clip / (norm.item() + CLIP_EPSILON)) if sound else 1.0
        for slot in slots:
            self.slot_steps[slot] = self.step
            self.recorder.after_step(self, slot, learning_rate=lr, clip=clip, sound=sound)
        return WorkReport(
            tuple(slots),
            tokens=sum(waiting.tokens for waiting in heard),
            rows=sum(waiting.rows for waiting in heard),
            seconds=time.perf_counter() - began,
            skipped=not sound,
        )

    # -- experts: see ExpertOwner ----------------------------------------------------------------------------------

    def experts_of(self, slot: int) -> list[OwnedExpert]:
        if slot not in self._experts:
            raise ValueError(f"slot {slot} is not owned")
        return self._experts[slot]

    def _hold(self, slot: int, experts: Sequence[OwnedExpert]) -> list[OwnedExpert]:
        held = []
        for expert in experts:
            trained = [t.detach().to(self.device, torch.float32, copy=True).requires_grad_() for t in expert.trained]
            held.append(expert.to(self.device).with_trained(trained))
        self._experts[slot] = held
        return held

    def _let_go(self, slot: int, published: Sequence[StandIn]) -> None:
        del self._experts[slot]
        self._waiting.pop(slot, None)
        self.slot_steps.pop(slot, None)
        self.recorder.forget(slot)

    def first_experts(self, slot: int) -> list[DenseExpert]:
        raise ValueError("a worker knows no layers: it cannot seed a slot, it fetches it")

    def standins(self, slot: int) -> list[StandIn]:
        if slot not in self.publishers:
            raise ValueError(f"slot {slot} is not owned, and a worker runs no stand-ins")
        return [publisher.published for publisher in self.publishers[slot]]
