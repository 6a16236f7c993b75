"""An island whose processes each compute a batch of every step, and merge gradients before it is taken.

So it is a peer with as many times the batch. Members hold what a forward takes, and no optimizer states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..learning.composer import Computed
from ..model.build import MoEModel, build_model
from ..run.manifest import StandInSpec
from .leader import Island
from .orders import Setup, Step, packed_gradients, unpack_gradients
from .replica import Answer, Replica, experts_in, fill, flat, numel
from .rows import StepRows, give, wanted_by

if TYPE_CHECKING:
    from ..learning.composer import Composer


def trained_of(model: MoEModel, owned: set[int]) -> list[nn.Parameter]:
    """What an optimizer moves, in an order that both sides know: backbone, routers' biases in it, then experts."""
    return [*model.backbone.values(), *experts_in(model.shards, owned)]


def sum_counts(counts_LE: Tensor) -> Tensor:
    """Routed pairs of all of the island, for the balance of experts."""
    total = counts_LE.clone()
    dist.all_reduce(total)
    return total


class DataParallel(Island):
    """The leader's side."""

    form = "data"
    _rows: StepRows | None = None

    def _compute(self, composer: Composer) -> Computed:
        changed, collector = self.changed(composer), composer.collector
        wanted = wanted_by(collector)
        batches = [composer.next_batch() for _ in range(self.size)]
        for member, batch in zip(self.members, batches[1:], strict=True):
            self.tell(member, Step(batch, composer.swarm_counts, wanted, changed))
        parameters = trained_of(composer.model, composer.owned)
        dist.broadcast(flat(parameters), 0)
        tokens = sum(batch.numel() for batch in batches)
        rows = self._rows = self._rows or StepRows(composer.manifest, 0)
        composer.model.set_sketch_tap(rows.tap(wanted, tokens))
        losses = composer.losses(batches[0].to(composer.device), sum_counts=sum_counts)
        torch.autograd.backward(losses.total / self.size)
        summed = packed_gradients(parameters, losses.lm / self.size)
        dist.reduce(summed, 0)
        for parameter in parameters:
            parameter.grad = None
        loss = unpack_gradients(parameters, summed)
        if collector is not None:
            parts = [rows.take(), *(self.hear(member) for member in self.members)]
            give(collector, parts, tokens, self.size, composer.device)  # nothing can fail from here on
        return Computed(loss.item(), tokens, losses.counts.cpu(), self.size, batches=self.size)


class DataReplica(Replica):
    """A member's: forward and backward of a whole model."""

    def __init__(self, setup: Setup) -> None:
        manifest = setup.manifest
        # Whatever its stand-ins are: the leader tells all slots before the first forward.
        super().__init__(setup, build_model(manifest.model, owned=(), standin=StandInSpec(), expert=setup.mode))

    def step(self, order: Step, answer: Answer) -> None:
        self.change(order.slots)
        parameters = trained_of(self.model, self.owned)
        weights = torch.empty(numel(parameters), device=self.device)
        dist.broadcast(weights, 0)
        fill(parameters, weights)
        size = self.setup.size
        self.model.set_sketch_tap(self.rows.tap(order.rows, order.batch.numel() * size))
        losses = self.model.loss(
            order.batch.to(self.device),
            swarm_counts=order.swarm_counts,
            balance_coef=self.train.balance_coef,
            z_coef=self.train.z_coef,
            sum_counts=sum_counts,
        )
        torch.autograd.backward(losses.total / size)
        dist.reduce(packed_gradients(parameters, losses.lm / size), 0)
        for parameter in parameters:
            parameter.grad = None
        if order.rows != "no":
            answer(self.rows.take())
