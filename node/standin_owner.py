"""The stand-ins that an owner publishes: their fits, what was published lately, and what form they have."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.experts import OwnedExpert
from ..kernels.interface import take
from ..kernels.replay import ReplayBuffer
from ..kernels.standin import Form, Menu, Publisher, StandIn, make_publisher, standin_of
from .choosing import Chooser, Place
from .logs import get_logger
from .manifest import ExpertShape, Manifest
from .model.init import expert_shape
from .past_standins import PastStandIns
from .slot_state import SlotTensors

log = get_logger(__name__)


class StandInOwner(ABC):
    """What `ExpertOwner` is towards those who run stand-ins. All of it belongs to the training thread."""

    menu: Menu  # of the run's stand-ins

    def __init__(self, manifest: Manifest, *, fit_seed: int) -> None:
        self.manifest = manifest
        self.shape: ExpertShape = expert_shape(manifest.model)
        self.publishers: dict[int, list[Publisher]] = {}  # by slot and position
        self.past = PastStandIns()
        self._fit_seed = fit_seed
        self._fidelity: dict[tuple[int, int], float] = {}  # as last measured
        self._chooser: Chooser | None = None  # made when it is first needed: the menu is known then
        self._wanted: dict[Place, Form] = {}  # chosen, and not published yet

    @property
    def owned(self) -> set[int]:
        """Slots whose experts are held in full."""
        return set(self.publishers)

    @abstractmethod
    def experts_of(self, slot: int) -> list[OwnedExpert]:
        """The owned experts of a slot by position. Raises ValueError if the slot is not owned."""

    @abstractmethod
    def standins(self, slot: int) -> list[StandIn]:
        """What everybody else runs for `slot`, by position: the published copy if owned, else the one in use."""

    @abstractmethod
    def _show_rows(self, slot: int, position: int) -> None:
        """Let the publisher see the rows that have come by sketches."""

    @abstractmethod
    def _published_by_default(self) -> Collection[int]:
        """Slots to publish where none are named."""

    def publish(self, slots: Collection[int] | None = None) -> dict[int, list[bytes]]:
        """Refit the stand-ins of owned `slots` (all but frozen ones) and return, per slot, one delta per position.

        Each delta is against what was published before, and is applied to it here exactly as receivers will. A slot of
        which a stand-in has another form from now on has no deltas, an empty list: others are to fetch what is
        published.
        """
        slots = sorted(self._published_by_default() if slots is None else slots)
        for slot in slots:
            for position in range(len(self.publishers[slot])):
                self._show_rows(slot, position)
        changed = self._change_forms(slots)
        deltas: dict[int, list[bytes]] = {}
        for slot in slots:
            deltas[slot] = []
            for publisher, expert in zip(self.publishers[slot], self.experts_of(slot), strict=True):
                if slot not in changed:
                    publisher.refit(expert)
                    deltas[slot].append(publisher.delta(expert))
            self.past.note(slot, self.publishers[slot])
        return deltas

    def _change_forms(self, slots: Collection[int]) -> set[int]:
        """Slots of `slots` of which a stand-in has another form now. Those of others change when they are published."""
        if self.manifest.standin.kind != "chosen":
            return set()
        self._chooser = self._chooser or Chooser(self.manifest.standin, self.shape, self.menu)
        experts = {slot: self.experts_of(slot) for slot in self.publishers}
        self._wanted |= self._chooser.next_forms(experts, self.publishers, slots)
        changed = set()
        for slot, position in [place for place in self._wanted if place[0] in slots]:
            form = self._wanted.pop((slot, position))
            old, expert = self.publishers[slot][position], experts[slot][position]
            standin = self._chooser.make(form, old, expert)
            self.publishers[slot][position] = self._publisher(slot, position, standin, old)
            changed.add(slot)
            log.info("standin.form", slot=slot, position=position, was=str(Form.of(old.published)), now=str(form))
        return changed

    def fidelity(self) -> list[float]:
        """Per position: mean over owned slots of 1 - ||E(x) - S(x)|| / ||E(x)||; nan where nothing is owned."""
        found: list[list[float]] = [[] for _ in range(self.shape.num_layers)]
        for slot, publishers in self.publishers.items():
            for position, (publisher, expert) in enumerate(zip(publishers, self.experts_of(slot), strict=True)):
                value = publisher.fidelity(expert)
                if math.isfinite(value):
                    found[position].append(value)
                    self._fidelity[slot, position] = value
        return [sum(values) / len(values) if values else math.nan for values in found]

    def fidelity_of(self, slot: int) -> tuple[float, ...]:
        """One slot's, by position, as last measured; empty before that."""
        values = [self._fidelity.get((slot, position)) for position in range(self.shape.num_layers)]
        known = tuple(value for value in values if value is not None)
        return known if len(known) == len(values) else ()

    def _make_publishers(self, slot: int, published: Sequence[StandIn]) -> list[Publisher]:
        """Of what others hold, by position. ValueError if that cannot be what stands in for a slot of this run."""
        if len(published) != self.shape.num_layers:
            raise ValueError(f"slot {slot}: {len(published)} published stand-ins for {self.shape.num_layers} layers")
        checked = [self.menu.check(standin) for standin in published]
        return [self._publisher(slot, position, standin) for position, standin in enumerate(checked)]

    def _publisher(self, slot: int, position: int, standin: StandIn, old: Publisher | None = None) -> Publisher:
        spec = self.manifest.standin
        return make_publisher(
            standin,
            rank=spec.rank,
            replay_rows=spec.replay_rows,
            refit_steps=spec.refit_steps,
            refit_learning_rate=spec.refit_learning_rate,
            act=self.shape.act,
            generator=torch.Generator().manual_seed(self._fit_seed * 1_000_003 + slot * 1009 + position),
            replay=self._replay() if old is None else old.replay,
        )

    def _replay(self) -> ReplayBuffer | None:
        """Of a new publisher: where forms are chosen, rows for any of them; else what its kind needs."""
        spec = self.manifest.standin
        return ReplayBuffer(spec.replay_rows, self.shape.hidden) if spec.kind == "chosen" else None

    def _begin_publishing(self, slot: int, publishers: list[Publisher]) -> None:
        self.publishers[slot] = publishers
        self.past.note(slot, publishers)

    def _end_publishing(self, slot: int) -> None:
        for position in range(len(self.publishers.pop(slot))):
            self._fidelity.pop((slot, position), None)
            self._wanted.pop((slot, position), None)
        self.past.forget(slot)

    def _publisher_state(self, slot: int, position: int) -> SlotTensors:
        state = self.publishers[slot][position].state_dict(replay=False)
        return {f"{position}.publisher.{key}": value.clone() for key, value in state.items()}

    def _restore_publisher(self, publisher: Publisher, state: Mapping[str, Tensor]) -> None:
        """Go on with the fit of a former owner, or of this one. ValueError if that is no state of a publisher.

        What is published stays: since the state was taken more may have been sent. If its form has changed since, there
        is no fit to go on with.
        """
        newest, then = publisher.published, standin_of(take(state, "published"), bases=self.menu.bases)
        if Form.of(self.menu.check(then)) != Form.of(newest):
            return
        publisher.load_state_dict(state)
        publisher.published = newest
