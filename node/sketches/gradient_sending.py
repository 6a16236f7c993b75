"""Gradient sketches as a composer brings them: its sums of an interval, to the round of each slot that others own.

On the training thread sums are taken, when they are due here or another composer has opened the interval; on the loop
they go into the rounds. Sums that cannot be delivered under their own interval's projections are dropped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...protocol.directory.standing import ACTIVE_PHASES
from ..learning.composer import Composer
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import Links
from ..standins.exchange import Exchange, Target
from ..watching.state import Count
from .gradient_collecting import CollectedGradient, GradientCollector
from .gradient_rounds import GradientRounds

log = get_logger(__name__)


@dataclass(frozen=True)
class _Taken:
    """One interval's sums on their way."""

    interval: int
    step: int  # of the composer
    slots: dict[int, tuple[Target, CollectedGradient]]


class GradientSender:
    """One composer's. `collector` is the composer's own."""

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Composer],
        exchange: Exchange,
        collector: GradientCollector,
        rounds: GradientRounds,
    ) -> None:
        self._links, self._trainer, self._exchange = links, trainer, exchange
        self._collector, self._rounds = collector, rounds
        self._every = links.manifest.sketch.gradient_every
        rounds.takers.append(self._on_open)

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Open the interval if it has been collected for long enough, or never will be."""
        collector = self._collector
        due = collector.steps >= self._every or (collector.steps and not composer.has_work())
        if not due or self._rounds.running or self._links.state.phase not in ACTIVE_PHASES:
            return  # while rounds run, it collects on: a slot has one at a time
        if self._exchange.owners():
            self._send(composer)
        else:
            collector.begin(collector.interval)  # nobody to learn from it

    def _collect(self, composer: Composer, interval: int) -> None:
        """Another composer has opened an interval: bring what there is, or catch up with the number."""
        collector = self._collector
        if collector.interval == interval:
            self._send(composer)
        elif collector.interval != interval + 1:  # else it has just been sent
            self._drop(interval + 1)

    def _send(self, composer: Composer) -> None:
        interval, targets = self._collector.interval, self._exchange.owners()
        order = self._exchange.order
        collected = self._collector.take({slot: order.outward(slot, to.epoch) for slot, to in targets.items()})
        if refused := self._collector.take_refused():
            self._links.state.count(Count.REFUSALS, "sketch-rows-not-finite", by=refused)
        taken = _Taken(interval, composer.step, {slot: (targets[slot], sums) for slot, sums in collected.items()})
        self._links.loop.call_soon_threadsafe(self._deliver, taken)

    def _drop(self, interval: int) -> None:
        """What is collected belongs to another interval than the swarm's; begin anew with that one."""
        if self._collector.tokens:
            self._lost("another-interval", len(self._exchange.owners()))
            log.info("sketch.interval_missed", collected=self._collector.interval, next=interval)
        self._collector.begin(interval)

    def _lost(self, reason: str, slots: int) -> None:
        if slots:
            self._links.state.count(Count.SKETCHES_LOST, reason, by=slots)

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _on_open(self, interval: int, step: int, opener: str) -> None:
        self._trainer.ask(lambda composer: self._collect(composer, interval))

    def _deliver(self, taken: _Taken) -> None:
        """Into the rounds, which are open by then, unless this peer's number was not the swarm's."""
        coming = self._rounds.intervals.next
        if taken.interval == coming - 1 or self._rounds.open(taken.interval, taken.step):
            for slot, (target, sums) in taken.slots.items():
                self._links.spawn(self._bring(slot, taken.interval, target, sums))
            return
        self._lost("another-interval", len(taken.slots))
        log.info("sketch.interval_missed", collected=taken.interval, next=coming)
        self._trainer.ask(lambda _: self._collector.begin(coming))

    async def _bring(self, slot: int, interval: int, target: Target, sums: CollectedGradient) -> None:
        ended = await self._rounds.round(
            slot, interval, sums.flat, tokens=sums.tokens, owner=target.owner, epoch=target.epoch
        )
        if isinstance(ended, str):
            self._lost(ended, 1)
