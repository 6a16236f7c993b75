"""Gradient sketches as an owner gets them: the mean over all composers' tokens, rebuilt and learned from between steps.

An owner joins the rounds of its slots as soon as an interval is opened. It believes what a complete round brings, which
is one vector whoever brought what; a vector that does not rebuild to a gradient is refused and counted.
"""

from __future__ import annotations

from typing import Generic

from torch import Tensor

from ...kernels.gradient_sketch import Projections
from ...protocol.averaging.sketch_averaging import credited_tokens
from ..learning.owning import Owner
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import Links
from ..slots.keeper import SlotKeeper
from ..standins.publishing import Publishing
from ..watching.state import Count
from .gradient_collecting import GradientForm
from .gradient_rounds import GradientRounds

log = get_logger(__name__)


class GradientReceiver(Generic[Owner]):
    """One owner's, a composer's or a worker's."""

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Owner],
        publishing: Publishing[Owner],
        keeper: SlotKeeper[Owner],
        form: GradientForm,
        rounds: GradientRounds,
    ) -> None:
        self._links, self._trainer = links, trainer
        self._publishing, self._keeper = publishing, keeper
        self._form, self._rounds = form, rounds
        self._projections: tuple[int, Projections] | None = None  # of the interval named, as last used
        self.learned = 0  # slots' means learned from so far
        rounds.takers.append(self._on_open)

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _on_open(self, interval: int, step: int, opener: str) -> None:
        for slot, epoch in sorted(self._keeper.held.items()):
            self._links.spawn(self._receive(slot, epoch, interval, step, opener))

    async def _receive(self, slot: int, epoch: int, interval: int, step: int, opener: str) -> None:
        owner = self._links.peer_id
        ended = await self._rounds.round(slot, interval, None, tokens=0, owner=owner, epoch=epoch)
        if not isinstance(ended, str):
            mean, tokens = ended.average, credited_tokens(ended)
            assert mean is not None
            self._trainer.ask(lambda owner: self._learn(owner, slot, epoch, interval, mean, tokens, step, opener))

    # -- training thread -------------------------------------------------------------------------------------------

    def _learn(
        self, owner: Owner, slot: int, epoch: int, interval: int, mean: Tensor, tokens: float, step: int, opener: str
    ) -> None:
        if slot not in owner.owned or self._keeper.held.get(slot) != epoch:
            self._links.state.count(Count.REFUSALS, "sketch-not-owner")  # it has changed hands meanwhile
            return
        try:
            gradients = self._rebuilt(slot, epoch, interval, mean)
            owner.hear_mean(opener, slot, gradients, tokens=tokens, step=step)
        except ValueError as error:
            self._links.state.count(Count.REFUSALS, "sketch-not-finite")
            log.warning("sketch.refused", slot=slot, interval=interval, error=str(error))
            return
        if not self.learned:
            log.info("sketch.first", slot=slot, tokens=round(tokens))
        self.learned += 1

    def _rebuilt(self, slot: int, epoch: int, interval: int, mean: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """By position, the mean gradients that a slot's vector stands for."""
        if self._projections is None or self._projections[0] != interval:
            self._projections = interval, self._form.projections(interval)
        projections = self._projections[1]
        parts = mean.view(-1, self._form.expert_numel)
        order = self._publishing.order.outward(slot, epoch)
        return {position: projections.rebuild(parts[place]) for place, position in enumerate(order)}
