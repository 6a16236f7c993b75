"""The stand-ins that an owner publishes: their fits, what was published lately, and what form they have."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ...kernels.experts import OwnedExpert
from ...kernels.interface import take
from ...kernels.replay import ReplayBuffer
from ...kernels.standin import Form, Menu, Publisher, StandIn, make_publisher, standin_of
from ..logs import get_logger
from ..model.init import expert_shape
from ..run.manifest import ExpertShape, Manifest
from ..slots.slot_state import SlotTensors
from .choosing import Chooser
from .past_standins import PastStandIns
from .publication import Made, Publication, Source

log = get_logger(__name__)

FIDELITY_EVERY = 4  # publications of a slot; measuring costs about as much as making a copy's delta
FIRST_FIDELITY = 1


class StandInOwner(ABC):
    """What `ExpertOwner` is towards those who run stand-ins. All of it belongs to the training thread."""

    menu: Menu  # of the run's stand-ins
    device: torch.device  # of the experts
    step: int

    def __init__(self, manifest: Manifest, *, fit_seed: int) -> None:
        self.manifest = manifest
        self.shape: ExpertShape = expert_shape(manifest.model)
        self.publishers: dict[int, list[Publisher]] = {}  # by slot and position
        self.past = PastStandIns()
        self._fit_seed = fit_seed
        self._publications: Counter[int] = Counter()  # by slot
        self._fidelity: dict[int, tuple[float, ...]] = {}  # by slot and position, as last measured
        self._chooser: Chooser | None = None  # made when it is first needed: the menu is known then

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
    def published_by_default(self) -> Collection[int]:
        """Slots to publish where none are named."""

    @property
    def publishes_beside(self) -> bool:
        """Whether publications take so long that they are to be made of copies, beside training."""
        return not self.manifest.standin.whole

    def publish(self, slots: Collection[int] | None = None) -> dict[int, list[bytes]]:
        """Refit the stand-ins of owned `slots` (all but frozen ones) and return, per slot, one delta per position.

        Each delta is against what was published before, and is applied to it here exactly as receivers will. A slot of
        which a stand-in has another form from now on has no deltas, an empty list: others are to fetch what is
        published.
        """
        publication = self.begin_publication(slots)
        publication.make()
        return {slot: made.deltas for slot, made in self.finish_publication(publication).items()}

    def begin_publication(self, slots: Collection[int] | None = None) -> Publication:
        """What `publish` does, in three parts of which the second, `Publication.make`, may be done on any thread if
        this owner `publishes_beside`."""
        slots = sorted(self.published_by_default() if slots is None else slots)
        for slot in slots:
            for position in range(len(self.publishers[slot])):
                self._show_rows(slot, position)
            self._publications[slot] += 1
        if self.manifest.standin.kind == "chosen" and self._chooser is None:
            self._chooser = Chooser(self.manifest.standin, self.shape, self.menu)
        return Publication(
            self.step,
            {slot: self._sources(slot) for slot in slots},
            dict(self.publishers),
            measured=[slot for slot in slots if self._publications[slot] % FIDELITY_EVERY == FIRST_FIDELITY],
            chooser=None if self._chooser is None else self._chooser.successor(),
            publisher=self._publisher,
        )

    def _sources(self, slot: int) -> list[Source]:
        pairs = zip(self.publishers[slot], self.experts_of(slot), strict=True)
        if self.publishes_beside:
            return [Source(publisher, expert.on_cpu(), publisher.replay.taken()) for publisher, expert in pairs]
        return [Source(publisher, expert, publisher.replay) for publisher, expert in pairs]

    def finish_publication(self, publication: Publication) -> dict[int, Made]:
        """Publish what has been made, by slot.

        Slots that were let go of, frozen, or published by another publication since this one began are left out.
        """
        gone = {slot for slot, publishers in publication.held.items() if self.publishers.get(slot) is not publishers}
        published = {slot: made for slot, made in publication.made.items() if slot not in gone}
        for slot, made in published.items():
            for position, (old, new) in enumerate(zip(self.publishers[slot], made.publishers, strict=True)):
                new.replay = old.replay
                was, now = Form.of(old.published), Form.of(new.published)
                if was != now:
                    log.info("standin.form", slot=slot, position=position, was=str(was), now=str(now))
            self.publishers[slot] = made.publishers
            self.past.note(slot, made.publishers)
            if made.fidelity:
                self._fidelity[slot] = made.fidelity
        if publication.chooser is not None:
            self._chooser = publication.chooser
            for slot in gone:
                self._chooser.forget(slot)
        return published

    def _set_aside(self, slot: int) -> None:
        """What is being made of the slot is not to be published."""
        self.publishers[slot] = list(self.publishers[slot])

    def fidelity(self) -> list[float]:
        """Per position: mean over owned slots of 1 - ||E(x) - S(x)|| / ||E(x)||, as last measured; nan before that."""
        if not self._fidelity:
            return [math.nan] * self.shape.num_layers
        return [sum(values) / len(values) for values in zip(*self._fidelity.values(), strict=True)]

    def _make_publishers(self, slot: int, published: Sequence[StandIn]) -> list[Publisher]:
        """Of what others hold, by position. ValueError if that cannot be what stands in for a slot of this run."""
        if len(published) != self.shape.num_layers:
            raise ValueError(f"slot {slot}: {len(published)} published stand-ins for {self.shape.num_layers} layers")
        checked = [self.menu.check(standin) for standin in published]
        return [self._publisher(slot, position, standin) for position, standin in enumerate(checked)]

    def _publisher(self, slot: int, position: int, standin: StandIn, replay: ReplayBuffer | None = None) -> Publisher:
        spec = self.manifest.standin
        return make_publisher(
            standin,
            rank=spec.rank,
            replay_rows=spec.replay_rows,
            refit_steps=spec.refit_steps,
            refit_learning_rate=spec.refit_learning_rate,
            act=self.shape.act,
            generator=torch.Generator().manual_seed(self._fit_seed * 1_000_003 + slot * 1009 + position),
            replay=self._replay() if replay is None else replay,
        )

    def _replay(self) -> ReplayBuffer | None:
        """Of a new publisher: where forms are chosen, rows for any of them; else what its kind needs."""
        spec = self.manifest.standin
        return ReplayBuffer(spec.replay_rows, self.shape.hidden) if spec.kind == "chosen" else None

    def _begin_publishing(self, slot: int, publishers: list[Publisher]) -> None:
        self.publishers[slot] = publishers
        self.past.note(slot, publishers)

    def _end_publishing(self, slot: int) -> None:
        del self.publishers[slot]
        self._publications.pop(slot, None)
        self._fidelity.pop(slot, None)
        self.past.forget(slot)
        if self._chooser is not None:
            self._chooser.forget(slot)

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
