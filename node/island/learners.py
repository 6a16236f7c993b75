"""An island whose processes each train by themselves for some steps, and then average their weights.

Local SGD inside the island (Stich 2018, https://arxiv.org/abs/1805.09767; DiLoCo's inner steps): every process has an
optimizer of its own and takes `every` steps on its own batches; then what they have become is averaged. In the swarm's
terms that is one peer, which is as it was, or merged, and nothing between: such a block of steps is one `train_step`
of its composer, so that whatever reads or changes the leader's state between two of them (an outer round, a commit, a
snapshot, a stand-in to publish, a slot that changes hands) finds the merged one, and has it stand for all tokens of the
island. Rejected: merging whenever something is asked for, between any two steps (each of a dozen readers would have to
know, and a commit would have to be taken in by members whose weights differ).

Averaging takes two halves, each once in a block: a sum to the leader at the end, and the leader's weights to everybody
at the beginning of the next, with all that the swarm has changed in between. Every learner keeps its own moments; one
that starts, or hears of a slot that it did not hold, takes the leader's.

What others' sketches teach an owned expert, the leader's optimizer alone takes in, in a mean over its own tokens and
theirs. So of that expert its weights count for as many tokens: with T tokens a learner and T' of sketches, (T + T') to
T. For one plain gradient step that makes the average the step of all tokens together.

A learner's balance of experts looks at its own routing and that of other composers. Members that die take what they
learned since the last merge with them; the leader keeps what it has, and the next block is formed anew after a pause.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..learning.composer import Computed, StepReport
from ..learning.optimizer import (
    checked_state,
    experts_group,
    group_of,
    learning_rate,
    make_optimizer,
    put_state,
    take_state,
    take_step,
)
from ..model.balance import balance_biases
from ..model.build import build_model
from ..run.manifest import StandInSpec
from .leader import BROKEN, Island
from .merging import trained_of
from .orders import Setup, Slot
from .replica import Answer, Replica, experts_in, fill, flat, numel
from .rows import Rows, Wanted, give_also, wanted_by

if TYPE_CHECKING:
    from ..learning.composer import Composer

Moments = dict[str, Tensor]  # of one parameter


@dataclass(frozen=True)
class Block:
    """Steps for one learner, up to a merge."""

    batches: tuple[Tensor, ...]  # (B, S) int64 each, one a step
    step: int  # of the run, that the first one is
    swarm_counts: Tensor | None
    rows: Wanted  # of experts that others own
    frozen: frozenset[int]  # slots that are owned, but not trained
    slots: dict[int, Slot]  # those that have changed
    expert_moments: dict[int, list[Moments]]  # of what is trained in owned ones of these, by layer and tensor
    backbone_moments: dict[str, Moments]  # of a learner that starts


@dataclass(frozen=True)
class Learned:
    """A member's answer, before the merge."""

    losses: tuple[float, ...]  # of its steps
    tokens: int  # that it learned from: not those of steps that it skipped
    skipped: bool  # whether there were such
    rows: Rows


def shares(composer: Composer, own_tokens: int) -> list[float]:
    """For how many learners' weights the leader's own count in the average: of each tensor of `trained_of`."""
    counted = [1.0] * len(composer.model.backbone)
    for slot in sorted(composer.owned):
        for position, expert in enumerate(composer.experts_of(slot)):
            share = 1.0 + composer.heard_tokens[slot, position] / own_tokens
            counted += [share] * len(expert.trained)
    return counted


class Learners(Island):
    """The leader's side.

    Args:
        every: steps between two merges.
    """

    form = "learners"

    def __init__(self, *args: Any, every: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._every = self.patience = every
        self._left = 0  # steps of the block that is under way
        self._answers: list[Learned] = []

    def train_step(self, composer: Composer) -> StepReport:
        """A block of steps and its merge; one step alone while there are no members."""
        steps = min(self._every, composer.train.steps - composer.step)
        try:
            if not self._begin(composer, steps):
                return composer.inner_step()
        except BROKEN as error:
            self.lose(error)
            return composer.inner_step()
        tokens = composer.tokens
        reports = []
        for left in reversed(range(steps)):
            self._left = left
            reports.append(composer.inner_step())
        merging = time.perf_counter()
        losses, skipped = [report.loss for report in reports], any(report.skipped for report in reports)
        if self.together:
            try:
                self._merge(composer, sum(report.tokens for report in reports))
                composer.tokens += sum(answer.tokens for answer in self._answers)
                losses += [loss for answer in self._answers for loss in answer.losses]
                skipped = skipped or any(answer.skipped for answer in self._answers)
                self.worked()
            except BROKEN as error:
                self.lose(error)
        return StepReport(
            loss=sum(losses) / len(losses),
            tokens=composer.tokens - tokens,
            forward_backward_seconds=sum(report.forward_backward_seconds for report in reports),
            optimizer_seconds=sum(r.optimizer_seconds for r in reports) + time.perf_counter() - merging,
            processes=self.size if self.together else 1,
            skipped=skipped,
            steps=steps,
        )

    def compute(self, composer: Composer) -> Computed:
        """The leader's own batch. With the last one of a block, the others' rows have come too, and can be sent on."""
        computed = composer.compute_alone()
        if self._left == 0 and self.together:
            try:
                self._answers = [self.hear(member) for member in self.members]
            except BROKEN as error:
                self.lose(error)
                return computed
            if composer.collector is not None:
                for answer in self._answers:
                    give_also(composer.collector, answer.rows, computed.tokens, self._steps, composer.device)
        return computed

    def _compute(self, composer: Composer) -> Computed:
        raise AssertionError("learners compute alone")

    def _begin(self, composer: Composer, steps: int) -> bool:
        starting = not self.together
        if not self.form_with(composer):
            return False
        self._steps = steps
        changed, optimizer = self.changed(composer), composer.optimizer
        expert_moments = {
            slot: [take_state(optimizer, t) for expert in composer.experts_of(slot) for t in expert.trained]
            for slot, now in changed.items()
            if now.experts is not None
        }
        backbone = composer.backbone if starting else {}
        backbone_moments = {name: take_state(optimizer, parameter) for name, parameter in backbone.items()}
        frozen, wanted = frozenset(composer.frozen), wanted_by(composer.collector)
        for member in self.members:
            batches = tuple(composer.next_batch() for _ in range(steps))
            order = Block(
                batches, composer.step, composer.swarm_counts, wanted, frozen, changed, expert_moments, backbone_moments
            )
            self.tell(member, order)
        composer.heard_tokens.clear()
        dist.broadcast(flat(trained_of(composer.model, composer.owned)), 0)
        return True

    @torch.no_grad()
    def _merge(self, composer: Composer, own_tokens: int) -> None:
        parameters, counted = trained_of(composer.model, composer.owned), shares(composer, own_tokens)
        total = flat(parameters)
        pieces = list(zip(torch.split(total, [p.numel() for p in parameters]), counted, strict=True))
        for piece, share in pieces:
            piece.mul_(share)
        dist.reduce(total, 0)
        for piece, share in pieces:
            piece.div_(self.size - 1 + share)
        fill(parameters, total)


class LearnerReplica(Replica):
    """A member's: a learner of its own."""

    def __init__(self, setup: Setup) -> None:
        manifest = setup.manifest
        # Whatever its stand-ins are: the leader tells all slots before the first forward.
        super().__init__(setup, build_model(manifest.model, owned=(), standin=StandInSpec(), expert=setup.mode))
        self._optimizer = make_optimizer(self.train, self.model.backbone)

    def step(self, order: Block, answer: Answer) -> None:
        self._change(order)
        parameters = trained_of(self.model, self.owned)
        weights = torch.empty(numel(parameters), device=self.device)
        dist.broadcast(weights, 0)
        fill(parameters, weights)
        del weights
        losses, tokens, skipped = list[float](), 0, False
        for number, batch in enumerate(order.batches):
            self.model.set_sketch_tap(self.rows.tap(order.rows, batch.numel(), more=number > 0))
            loss, sound = self._learn(order, number, batch.to(self.device))
            losses.append(loss)
            tokens += batch.numel() if sound else 0
            skipped = skipped or not sound
        answer(Learned(tuple(losses), tokens, skipped, self.rows.take()))
        dist.reduce(flat(parameters), 0)

    def _learn(self, order: Block, number: int, batch: Tensor) -> tuple[float, bool]:
        """One inner step; as a composer's, but for sketches of others. Its loss, and whether anything was learned."""
        train = self.train
        losses = self.model.loss(
            batch, swarm_counts=order.swarm_counts, balance_coef=train.balance_coef, z_coef=train.z_coef
        )
        torch.autograd.backward(losses.total)
        for parameter in experts_in(self.model.shards, self.owned & order.frozen):
            parameter.grad = None
        loss = losses.lm.item()
        rate = learning_rate(train, order.step + number)
        sound = take_step(self._optimizer, rate, train.grad_clip, loss)
        if sound and train.bias_rate:
            biases = self.model.selection_biases
            balance_biases(biases, losses.counts, train.bias_rate, swarm_counts_LE=order.swarm_counts)
        return loss, sound

    def _change(self, order: Block) -> None:
        """Slots come and go, with their part of the optimizer."""
        for parameter in (gone := experts_in(self.model.shards, self.owned & order.slots.keys())):
            self._optimizer.state.pop(parameter, None)
        held = {id(parameter) for parameter in gone}
        group = experts_group(self._optimizer)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in held]
        self.change(order.slots)
        for name, moments in order.backbone_moments.items():
            self._put(self.model.backbone[name], moments)
        for slot, of_slot in order.expert_moments.items():
            experts = experts_in(self.model.shards, {slot})
            group["params"].extend(experts)
            for parameter, moments in zip(experts, of_slot, strict=True):
                self._put(parameter, moments)

    def _put(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        group = group_of(self._optimizer, parameter)
        put_state(self._optimizer, parameter, checked_state(self._optimizer, group, parameter.shape, moments))
