"""The composer: trains the backbone and the experts it owns, and runs stand-ins for all others.

This file holds the learning and no networking, so that the same code runs in a peer and in the in-process swarm of
`benchmarks/`. Whoever drives it calls, from one thread:

    train_step()                       one inner step on local data
    publish(slots)                     deltas of owned experts' stand-ins, for everybody else
    begin_round(f) / commit_round(f)   one outer step of backbone fragment f, applied while training goes on
    adopt(slot) / release(slot)        ownership comes and goes, with optimizer state

Outer steps follow DiLoCo: the pseudo-gradient is v = common - local. A round may take several inner steps; when its
average arrives, local becomes new_common + (local_now - local_sent), so nothing learned meanwhile is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...kernels.experts import DenseExpert, OwnedExpert
from ...kernels.standin import StandIn
from ...protocol.averaging import radial
from ...protocol.averaging.fragments import Fragment, flatten, unflatten
from ...protocol.averaging.merging import Facts, outer_step
from ...protocol.averaging.parts import COARSE, PartCodec, sendable
from ...protocol.averaging.radial import NormedClaims
from ..model.balance import balance_biases
from ..model.build import Losses, SumCounts, build_model
from ..model.cut import backbone_fragments
from ..model.start import Start
from ..run.manifest import Manifest
from ..sketches.sketching import Collector
from ..slots.slot_formats import experts_like
from .expert_mode import ExpertMode, expert_type
from .optimizer import make_optimizer, take_step
from .owning import ExpertOwner

if TYPE_CHECKING:
    from ..island.leader import Island

NextBatch = Callable[[], Tensor]

# Copies need replay rows only to measure fidelity; every fourth step keeps them fresh at a quarter of the cost.
OBSERVE_COPIES_EVERY = 4


@dataclass(frozen=True)
class StepReport:
    """One inner step, or some: mean loss over their tokens (nats per token), tokens seen, and seconds by phase."""

    loss: float
    tokens: int
    forward_backward_seconds: float
    optimizer_seconds: float
    processes: int = 1  # that computed it together
    skipped: bool = False  # loss or gradients were not finite: nothing was learned from a batch
    steps: int = 1


class Computed(NamedTuple):
    """What a forward and backward came to, beside gradients."""

    loss: float
    tokens: int
    counts: Tensor  # (L, E) int64 on the CPU, pairs routed to each expert
    processes: int = 1
    batches: int = 1  # of the run's size


class Entry(NamedTuple):
    """What a composer brings into an outer round of one fragment."""

    vector: Tensor  # flat float32, to be averaged: the pseudo-gradient common - local, or `radial.split` of it
    tokens: int  # that it stands for
    steps: int
    norms: tuple[float, ...] = ()  # where the merge is radial


@dataclass
class _Round:
    """What this composer sent into an outer round, kept until the round ends."""

    sent: Tensor  # the fragment as it stood when the round began, flat float32
    lost: Tensor | None  # of what was to be sent, what the codec did not let through
    steps: int  # inner steps since this fragment's last commit
    tokens: int


class Composer(ExpertOwner):
    """One learner. `owned` slots hold full experts; `next_batch` yields int64 tokens of shape (B, context_length).

    It computes on `device`; all that travels, and all that must be equal to the bit, is made on the CPU.
    `start` is where first weights come from; by default a function of the manifest alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        owned: Collection[int],
        next_batch: NextBatch,
        fit_seed: int = 0,
        start: Start | None = None,
        device: torch.device | str = "cpu",
        mode: ExpertMode | None = None,
    ) -> None:
        super().__init__(manifest, fit_seed=fit_seed, mode=mode)
        self.next_batch = next_batch
        self.model = build_model(manifest.model, owned=owned, standin=manifest.standin, expert=self.mode, start=start)
        self.menu, self.device = self.model.menu, torch.device(device)
        if self.train.bias_rate and not self.model.selection_biases:
            raise ValueError("train.bias_rate needs routers with selection biases, and this family's have none")
        self.model.place(self.device)
        self.backbone = self.model.backbone
        self.tokens = 0
        self.swarm_counts: Tensor | None = None  # (L, E) routed tokens of the other composers, newest known
        self.last_counts: Tensor | None = None  # (L, E) of this composer's last step
        self.last_batches = 1  # that these are of
        self.collector: Collector | None = None  # hears of rows for experts that others own; None sends no sketches
        self.on_computed: Callable[[Composer], None] | None = None  # called between the halves of each step
        self._computed: tuple[Computed, float] | None = None  # and the seconds that it took
        self._taken = 0  # steps in the last `train_step`
        self.island: Island | None = None  # other processes that compute with this one
        self.optimizer = make_optimizer(self.train, self.backbone)
        for slot in sorted(owned):
            experts = self.model.experts_of(slot)
            first = [self.menu.make(self.menu.forms[0], *expert.masters()) for expert in experts]
            self._begin_owning(slot, experts, self._make_publishers(slot, first))

        self.fragments = backbone_fragments(manifest)
        self.common = [flatten(f, self.backbone) for f in self.fragments]
        self.momentum = [torch.zeros_like(c) for c in self.common]
        self._rounds: dict[int, _Round] = {}  # by fragment, under way
        self._doubtful: dict[int, _Round] = {}  # that were given up here
        self.lost: dict[int, Tensor] = {}  # by fragment: what a coarse codec kept back; sent with the next commit
        self._since_commit = [(0, 0) for _ in self.fragments]  # (step, tokens) that each fragment's common state has

    # -- inner training ------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return self.step < self.train.steps

    def train_step(self) -> StepReport:
        """One inner step, or as many as an island takes between two merges."""
        before = self.step
        report = self.inner_step() if self.island is None else self.island.train_step(self)
        self._taken = self.step - before
        return report

    def came_round(self, every: int) -> bool:
        """Whether a multiple of `every` steps was reached in the last `train_step`."""
        return self.step // every > (self.step - self._taken) // every

    def inner_step(self) -> StepReport:
        """One: forward, backward, clip, update."""
        self.compute()
        if self.on_computed is not None:
            self.on_computed(self)
        return self.apply()

    def compute(self) -> None:
        """The first half of a step: forward and backward. What it learned about others' experts is in `collector`."""
        self.model.set_tap(self.observe if self.observing else None)
        began = time.perf_counter()
        computed = (self.island.compute(self) if self.island is not None else None) or self.compute_alone()
        self.last_counts, self.last_batches = computed.counts, computed.batches
        if self.collector is not None and not math.isfinite(computed.loss):
            self.collector.withdraw(computed.tokens, computed.batches)  # of no rows, they would thin out the rest
        self._computed = computed, time.perf_counter() - began

    @property
    def observing(self) -> bool:
        """Whether stand-ins are shown the rows of the next step."""
        return not self.manifest.standin.whole or self.step % OBSERVE_COPIES_EVERY == 0

    def compute_alone(self) -> Computed:
        """Of one batch, by this process."""
        batch = self.next_batch().to(self.device)
        if self.collector is not None:
            self.collector.begin_step(batch.numel())
        self.model.set_sketch_tap(None if self.collector is None else self.collector.add)
        losses = self.losses(batch)
        torch.autograd.backward(losses.total)
        return Computed(losses.lm.item(), batch.numel(), losses.counts.cpu())

    def losses(self, batch: Tensor, sum_counts: SumCounts | None = None) -> Losses:
        """Of one batch on this composer's device, weighed as the run wants it."""
        return self.model.loss(
            batch,
            swarm_counts=self.swarm_counts,
            balance_coef=self.train.balance_coef,
            z_coef=self.train.z_coef,
            sum_counts=sum_counts,
        )

    def apply(self) -> StepReport:
        """The second half: take in the sketches that have come, clip, update."""
        assert self._computed is not None
        (loss, tokens, _, processes, _), seconds = self._computed
        self._computed = None
        middle = time.perf_counter()
        self._set_gradients(tokens, self.owned)
        sound = take_step(self.optimizer, self.learning_rate(), self.train.grad_clip, loss)
        if sound:
            self._balance()
        self.step += 1
        self.tokens += tokens if sound else 0  # what taught nothing gives no weight in a round
        return StepReport(loss, tokens, seconds, time.perf_counter() - middle, processes, skipped=not sound)

    def _balance(self) -> None:
        if self.train.bias_rate and self.last_counts is not None:
            biases, rate = self.model.selection_biases, self.train.bias_rate
            balance_biases(biases, self.last_counts, rate, swarm_counts_LE=self.swarm_counts)

    def observe(self, layer: int, slot: int, x_ND: Tensor, gate_N: Tensor) -> None:
        """Show an owned slot's stand-in rows that were routed to it; the shard's `OwnedRowsTap`."""
        self.publishers[slot][layer].observe(x_ND, gate_N)

    # -- experts: see ExpertOwner ----------------------------------------------------------------------------------

    def experts_of(self, slot: int) -> list[OwnedExpert]:
        return self.model.experts_of(slot)

    def _hold(self, slot: int, experts: Sequence[OwnedExpert]) -> list[OwnedExpert]:
        return [shard.hold(slot, expert) for shard, expert in zip(self.model.shards, experts, strict=True)]

    def _let_go(self, slot: int, published: Sequence[StandIn]) -> None:
        for shard, standin in zip(self.model.shards, published, strict=True):
            shard.release(slot, standin)

    def first_experts(self, slot: int) -> list[DenseExpert]:
        layers = range(len(self.model.shards))
        return [expert_type(self.train)(*self.model.initial_expert(layer, slot)) for layer in layers]

    def experts_from_standins(self, slot: int) -> list[DenseExpert]:
        """What the stand-ins of a slot of others tell of its experts; a narrow one has not all neurons: as seeded."""
        standins = self.standins(slot)
        if any(standin.width != self.shape.width for standin in standins):
            return self.first_experts(slot)
        return experts_like(standins, self.train)

    def standins(self, slot: int) -> list[StandIn]:
        if slot in self.publishers:
            return [publisher.published for publisher in self.publishers[slot]]
        return [shard.standin(slot) for shard in self.model.shards]

    def set_standins(self, slot: int, standins: Sequence[StandIn]) -> None:
        """Replace all layers' stand-ins of a slot that is not owned (after a snapshot)."""
        for shard, standin in zip(self.model.shards, standins, strict=True):
            shard.set_standin(slot, standin)

    # -- outer steps ----------------------------------------------------------------------------------------------

    def local_fragment(self, index: int) -> Tensor:
        """A fragment as it stands here now, local drift included; flat float32."""
        return flatten(self.fragments[index], self.backbone)

    @torch.no_grad()
    def _write(self, fragment: Fragment, flat: Tensor) -> None:
        for name, piece in unflatten(fragment, flat).items():
            parameter = self.backbone[name]
            parameter.copy_(piece.view_as(parameter))

    def resume(
        self,
        *,
        step: int,
        tokens: int,
        common: list[Tensor],
        momentum: list[Tensor],
        unmerged: Sequence[tuple[int, int]],
        lost: Mapping[int, Tensor],
    ) -> None:
        """Go on from a checkpoint: counters and last common state, whose weights are in the backbone already.

        Args:
            unmerged: as `unmerged` said, by fragment.
            lost: by fragment, what a coarse codec had kept back.
        """
        self.step, self.tokens = step, tokens
        self.common, self.momentum, self.lost = common, momentum, dict(lost)
        self._since_commit = [(step - steps, tokens - more) for steps, more in unmerged]

    def go_to(self, step: int) -> None:
        """Go on at a later step of the schedule, where others are. What is unmerged, and under way, stays as it is."""
        passed, self.step = step - self.step, step
        self._since_commit = [(since + passed, tokens) for since, tokens in self._since_commit]
        for entered in [*self._rounds.values(), *self._doubtful.values()]:
            entered.steps += passed

    def steps_since_commit(self, index: int) -> int:
        """The first of `unmerged`."""
        return self.unmerged(index)[0]

    def unmerged(self, index: int) -> tuple[int, int]:
        """Inner steps and tokens of this composer that fragment `index`'s common state does not have yet."""
        since_step, since_tokens = self._since_commit[index]
        return self.step - since_step, self.tokens - since_tokens

    def begin_round(self, index: int) -> Entry:
        """Enter an outer round of one fragment."""
        sent = self.local_fragment(index)
        steps, tokens = self.unmerged(index)
        pseudo_gradient = self.common[index] - sent
        if index in self.lost:
            pseudo_gradient += self.lost[index]
        entry = Entry(pseudo_gradient, tokens, steps)
        if self.manifest.outer.merge == "radial":
            vector, norms = radial.split(self.fragments[index], pseudo_gradient)
            entry = entry._replace(vector=vector, norms=norms)
        self._rounds[index] = _Round(sent, self._not_let_through(index, pseudo_gradient, entry), self.step, self.tokens)
        return entry

    def _not_let_through(self, index: int, wanted: Tensor, entry: Entry) -> Tensor | None:
        """What is missing in the pseudo-gradient as others will decode it; None where the codec is fine enough.

        Error feedback (Seide et al. 2014, Karimireddy et al. 2019): sent with the next round, nothing is lost for good.
        """
        spec = self.manifest.outer
        if spec.codec not in COARSE or not sendable(entry.vector):
            return None
        received = PartCodec(spec.codec).as_received(entry.vector)
        if spec.merge == "radial":
            received = radial.combine(self.fragments[index], received, [Facts("", 1, 1, entry.norms)])
        return wanted - received

    def propose(self, index: int, average: Tensor, facts: Sequence[NormedClaims] = ()) -> tuple[Tensor, Tensor]:
        """The fragment and momentum that committing the `average` of entries would give. Changes nothing.

        `facts`: of all whose entries are in it; only a radial merge needs them. Raises ValueError as `radial.combine`
        and `outer_step` do.
        """
        spec = self.manifest.outer
        if spec.merge == "radial":
            average = radial.combine(self.fragments[index], average, facts)
        return outer_step(self.common[index], average, self.momentum[index], spec.learning_rate, spec.momentum)

    def commit_round(self, index: int, fragment: Tensor, momentum: Tensor) -> None:
        """Make (fragment, momentum) the last common state, keeping what it does not contain.

        Call `abandon_round` first if this composer entered a round but the state was made without it.
        """
        entered = self._rounds.pop(index, None) or self._doubtful.get(index)
        self._doubtful.pop(index, None)
        if entered is None:
            # Not a member: all that was learned here since the last common state is still to be merged.
            drift = self.local_fragment(index) - self.common[index]
        else:
            drift = self.local_fragment(index) - entered.sent
            self._since_commit[index] = (entered.steps, entered.tokens)
            if entered.lost is not None:
                self.lost[index] = entered.lost
        self.common[index], self.momentum[index] = fragment, momentum
        self._write(self.fragments[index], fragment + drift)

    def abandon_round(self, index: int) -> None:
        """A round ended without a commit, or in one without this composer: nothing changes, training goes on."""
        self._rounds.pop(index, None)
        self._doubtful.pop(index, None)

    def withdraw_round(self, index: int) -> None:
        """An attempt at a round ended before anybody had its entry. What an earlier one has sent may still be
        committed."""
        self._rounds.pop(index, None)

    def doubt_round(self, index: int) -> None:
        """An attempt at a round has failed as seen from here; others have its entry, and may commit it all the same."""
        if index in self._rounds:
            self._doubtful[index] = self._rounds.pop(index)

    def reset_fragment(self, index: int, fragment: Tensor, momentum: Tensor) -> None:
        """Take the swarm's state and drop local drift: for a peer that joins or fell behind."""
        self.abandon_round(index)
        self.lost.pop(index, None)
        self.common[index], self.momentum[index] = fragment, momentum
        self._since_commit[index] = (self.step, self.tokens)
        self._write(self.fragments[index], fragment)
