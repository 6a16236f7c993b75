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

import torch
from torch import Tensor

from ..kernels.experts import DenseExpert
from ..kernels.interface import check_tensor
from ..kernels.standin import Publisher, StandIn, make_publisher
from ..protocol.fragments import Fragment, flatten, partition, unflatten
from ..protocol.merging import outer_step
from .manifest import Manifest, TrainSpec
from .model.build import build_model
from .model.init import expert_shape
from .optimizer import checked_state, make_optimizer, put_state, take_state

SlotTensors = dict[str, Tensor]
NextBatch = Callable[[], Tensor]

# Lowbit copies need replay rows only to measure fidelity; every fourth step keeps them fresh at a quarter of the cost.
LOWBIT_OBSERVE_EVERY = 4


@dataclass(frozen=True)
class StepReport:
    """One inner step: mean loss over its tokens (nats per token), tokens seen, and seconds by phase."""

    loss: float
    tokens: int
    forward_backward_seconds: float
    optimizer_seconds: float
    skipped: bool = False  # loss or gradients were not finite: nothing was learned from this batch


@dataclass
class _Round:
    """What this composer sent into an outer round, kept until the round ends."""

    sent: Tensor  # the fragment as it stood when the round began, flat float32
    steps: int  # inner steps since this fragment's last commit
    tokens: int


class Composer:
    """One learner. `owned` slots hold full experts; `next_batch` yields int64 tokens of shape (B, context_length)."""

    def __init__(self, manifest: Manifest, *, owned: Collection[int], next_batch: NextBatch, fit_seed: int = 0) -> None:
        self.manifest = manifest
        self.train: TrainSpec = manifest.train
        self.next_batch = next_batch
        self.model = build_model(manifest.model, owned=owned, standin=manifest.standin)
        self.shape = expert_shape(manifest.model)
        self.backbone = self.model.backbone
        self.num_slots = self.shape.num_experts
        self.step = 0
        self.tokens = 0
        self.swarm_counts: Tensor | None = None  # (L, E) routed tokens of the other composers, newest known
        self.last_counts: Tensor | None = None  # (L, E) of this composer's last step
        self.optimizer = make_optimizer(self.train, self.backbone)
        self._fit_seed = fit_seed
        self.publishers: dict[int, list[Publisher]] = {}
        self._frozen: set[int] = set()  # owned, but in the middle of a handover: not trained
        for slot in sorted(owned):
            experts = self.model.experts_of(slot)
            self._begin_owning(slot, experts, self._make_publishers(slot, experts, published=None))

        self.fragments: list[Fragment] = partition(
            {name: tuple(p.shape) for name, p in self.backbone.items()}, manifest.outer.fragments
        )
        self.common = [flatten(f, self.backbone) for f in self.fragments]
        self.momentum = [torch.zeros_like(c) for c in self.common]
        self._rounds: dict[int, _Round] = {}
        self._since_commit = [(0, 0) for _ in self.fragments]  # (step, tokens) that each fragment's common state has

    # -- inner training ------------------------------------------------------------------------------------------

    @property
    def owned(self) -> set[int]:
        """Slots whose experts this composer holds in full."""
        return set(self.publishers)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine from `learning_rate` down to `final_lr_fraction` of it at `steps`."""
        t = self.train
        if self.step < t.warmup_steps:
            return t.learning_rate * (self.step + 1) / t.warmup_steps
        progress = min(1.0, (self.step - t.warmup_steps) / max(1, t.steps - t.warmup_steps))
        scale = t.final_lr_fraction + (1 - t.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return t.learning_rate * scale

    def train_step(self) -> StepReport:
        """One inner step: forward, backward, clip, AdamW."""
        observing = self.manifest.standin.kind == "narrow" or self.step % LOWBIT_OBSERVE_EVERY == 0
        self.model.set_tap(self._observe if observing else None)
        batch = self.next_batch()
        began = time.perf_counter()
        losses = self.model.loss(batch, swarm_counts=self.swarm_counts)
        total = losses.lm + self.train.balance_coef * losses.balance + self.train.z_coef * losses.z
        torch.autograd.backward(total)
        middle = time.perf_counter()
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for slot in self._frozen:
            for expert in self.model.experts_of(slot):
                expert.gate_up.grad = expert.down.grad = None
        norm = torch.nn.utils.clip_grad_norm_(trained, self.train.grad_clip)
        loss = losses.lm.item()
        sound = math.isfinite(loss) and math.isfinite(norm.item())
        if sound:  # a bad batch must not poison weights that others merge
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last_counts = losses.counts
        self.step += 1
        self.tokens += batch.numel()
        return StepReport(loss, batch.numel(), middle - began, time.perf_counter() - middle, skipped=not sound)

    def _observe(self, layer: int, slot: int, x_ND: Tensor, gate_N: Tensor) -> None:
        self.publishers[slot][layer].observe(x_ND, gate_N)

    # -- stand-ins -------------------------------------------------------------------------------------------------

    def publish(self, slots: Collection[int] | None = None) -> dict[int, list[bytes]]:
        """Refit the stand-ins of owned `slots` and return, per slot, one delta per MoE layer.

        Each delta is against what was published before, and is applied to it here exactly as receivers will.
        """
        deltas: dict[int, list[bytes]] = {}
        for slot in sorted(self.owned if slots is None else slots):
            layers = []
            for publisher, expert in zip(self.publishers[slot], self.model.experts_of(slot), strict=True):
                publisher.refit(expert)
                layers.append(publisher.delta(expert))
            deltas[slot] = layers
        return deltas

    def standins(self, slot: int) -> list[StandIn]:
        """What everybody else runs for `slot`, one per layer: the published copy if owned, else the one in use."""
        if slot in self.publishers:
            return [publisher.published for publisher in self.publishers[slot]]
        return [shard.standin(slot) for shard in self.model.shards]

    def set_standins(self, slot: int, standins: Sequence[StandIn]) -> None:
        """Replace all layers' stand-ins of a slot that is not owned (after a snapshot)."""
        for shard, standin in zip(self.model.shards, standins, strict=True):
            shard.set_standin(slot, standin)

    def fidelity(self) -> list[float]:
        """Per MoE layer: mean over owned slots of 1 - ||E(x) - S(x)|| / ||E(x)||; nan where nothing is owned."""
        per_layer: list[list[float]] = [[] for _ in self.model.shards]
        for slot, publishers in self.publishers.items():
            for layer, (publisher, expert) in enumerate(zip(publishers, self.model.experts_of(slot), strict=True)):
                value = publisher.fidelity(expert)
                if math.isfinite(value):
                    per_layer[layer].append(value)
        return [sum(values) / len(values) if values else math.nan for values in per_layer]

    # -- ownership ------------------------------------------------------------------------------------------------

    def _make_publishers(
        self, slot: int, experts: Sequence[DenseExpert], published: Sequence[StandIn] | None
    ) -> list[Publisher]:
        spec = self.manifest.standin
        if published is not None and len(published) != len(experts):
            raise ValueError(f"slot {slot}: {len(published)} published stand-ins for {len(experts)} layers")
        return [
            make_publisher(
                spec.kind,
                expert,
                published=None if published is None else published[layer],
                width=max(1, round(spec.width_fraction * self.shape.width)),
                rank=spec.rank,
                replay_rows=spec.replay_rows,
                refit_steps=spec.refit_steps,
                refit_learning_rate=spec.refit_learning_rate,
                act=self.shape.act,
                generator=torch.Generator().manual_seed(self._fit_seed * 1_000_003 + slot * 1009 + layer),
            )
            for layer, expert in enumerate(experts)
        ]

    def _begin_owning(self, slot: int, experts: Sequence[DenseExpert], publishers: list[Publisher]) -> None:
        self.publishers[slot] = publishers
        group = self.optimizer.param_groups[0]  # matrices, with weight decay
        group["params"].extend(t for expert in experts for t in (expert.gate_up, expert.down))

    def snapshot(self, slot: int) -> SlotTensors:
        """Everything that makes up an owned slot: weights, optimizer state, publisher state. Copies, by name."""
        tensors: SlotTensors = {}
        for layer, expert in enumerate(self.model.experts_of(slot)):
            for name, parameter in (("gate_up", expert.gate_up), ("down", expert.down)):
                tensors[f"{layer}.{name}"] = parameter.detach().clone()
                for key, value in take_state(self.optimizer, parameter).items():
                    tensors[f"{layer}.{name}.{key}"] = value
            for key, value in self.publishers[slot][layer].state_dict(replay=False).items():
                tensors[f"{layer}.publisher.{key}"] = value.clone()
        return tensors

    def freeze(self, slot: int) -> None:
        """Stop training an owned slot while a copy of it travels to its next owner. ValueError if it is not owned."""
        if slot not in self.publishers:
            raise ValueError(f"slot {slot} is not owned")
        self._frozen.add(slot)

    def thaw(self, slot: int) -> None:
        """The handover did not happen: train on."""
        self._frozen.discard(slot)

    def adopt(self, slot: int, tensors: SlotTensors | None, published: Sequence[StandIn] | None = None) -> None:
        """Become the owner of `slot`.

        Args:
            tensors: a snapshot; None restarts the slot from its seeded initial weights.
            published: what the others hold, per layer; by default what this composer ran for the slot so far.

        Raises:
            ValueError: the snapshot or `published` does not fit this model or is not finite; nothing has changed then.
        """
        if slot in self.publishers:
            raise ValueError(f"slot {slot} is owned already")
        published = self.standins(slot) if published is None else published
        # Everything that can fail comes before the first change: half a slot would end the training.
        if tensors is None:
            experts = [DenseExpert(*self.model.initial_expert(layer, slot)) for layer in range(len(self.model.shards))]
        else:
            experts = [self._checked_expert(layer, tensors) for layer in range(len(self.model.shards))]
        publishers = self._make_publishers(slot, experts, published)
        states: list[list[dict[str, Tensor | int]]] = [[{}, {}] for _ in experts]
        if tensors is not None:
            for layer, (expert, publisher) in enumerate(zip(experts, publishers, strict=True)):
                states[layer] = [
                    checked_state(self.optimizer, weights.shape, _under(f"{layer}.{name}.", tensors))
                    for name, weights in (("gate_up", expert.gate_up), ("down", expert.down))
                ]
                newest = publisher.published  # since the snapshot more may have been sent
                publisher.load_state_dict(_under(f"{layer}.publisher.", tensors))
                publisher.published = newest
        held = [
            shard.adopt(slot, expert.gate_up, expert.down)
            for shard, expert in zip(self.model.shards, experts, strict=True)
        ]
        self._begin_owning(slot, held, publishers)
        for expert, (gate_up, down) in zip(held, states, strict=True):
            put_state(self.optimizer, expert.gate_up, gate_up)
            put_state(self.optimizer, expert.down, down)

    def _checked_expert(self, layer: int, tensors: SlotTensors) -> DenseExpert:
        width, hidden = self.shape.width, self.shape.hidden
        weights = []
        for name, shape in (("gate_up", (2 * width, hidden)), ("down", (hidden, width))):
            value = tensors.get(f"{layer}.{name}")
            if value is None:
                raise ValueError(f"the snapshot lacks layer {layer}'s {name}")
            check_tensor(f"layer {layer}'s {name}", value, torch.float32, shape)
            weights.append(value)
        return DenseExpert(*weights)

    def release(self, slot: int) -> None:
        """Stop owning `slot`: from now on the published copy stands in for it."""
        published = self.standins(slot)
        experts = self.model.experts_of(slot)
        gone = {id(t) for expert in experts for t in (expert.gate_up, expert.down)}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for expert in experts:
            self.optimizer.state.pop(expert.gate_up, None)
            self.optimizer.state.pop(expert.down, None)
        del self.publishers[slot]
        self._frozen.discard(slot)
        for shard, standin in zip(self.model.shards, published, strict=True):
            shard.release(slot, standin)

    # -- outer steps ----------------------------------------------------------------------------------------------

    def local_fragment(self, index: int) -> Tensor:
        """A fragment as it stands here now, local drift included; flat float32."""
        return flatten(self.fragments[index], self.backbone)

    @torch.no_grad()
    def _write(self, fragment: Fragment, flat: Tensor) -> None:
        for name, piece in unflatten(fragment, flat).items():
            parameter = self.backbone[name]
            parameter.copy_(piece.view_as(parameter))

    def resume(self, *, step: int, tokens: int, common: list[Tensor], momentum: list[Tensor]) -> None:
        """Go on from a checkpoint: counters and last common state, whose weights are in the backbone already."""
        self.step, self.tokens = step, tokens
        self.common, self.momentum = common, momentum
        self._since_commit = [(step, tokens) for _ in self.fragments]

    def start_at(self, step: int) -> None:
        """Begin a run that others have trained for `step` steps: the schedule goes on from there."""
        self.step = step
        self._since_commit = [(step, self.tokens) for _ in self.fragments]

    def steps_since_commit(self, index: int) -> int:
        """Inner steps of this composer that fragment `index`'s common state does not have yet."""
        return self.step - self._since_commit[index][0]

    def begin_round(self, index: int) -> tuple[Tensor, int, int]:
        """Enter an outer round of one fragment.

        Returns:
            the pseudo-gradient common - local (flat float32), and the tokens and steps it stands for.
        """
        sent = self.local_fragment(index)
        since_step, since_tokens = self._since_commit[index]
        self._rounds[index] = _Round(sent, self.step, self.tokens)
        return self.common[index] - sent, self.tokens - since_tokens, self.step - since_step

    def propose(self, index: int, average: Tensor) -> tuple[Tensor, Tensor]:
        """The fragment and momentum that committing `average` would give. Changes nothing."""
        spec = self.manifest.outer
        return outer_step(self.common[index], average, self.momentum[index], spec.learning_rate, spec.momentum)

    def commit_round(self, index: int, fragment: Tensor, momentum: Tensor) -> None:
        """Make (fragment, momentum) the last common state, keeping what it does not contain.

        Call `abandon_round` first if this composer entered a round but the state was made without it.
        """
        entered = self._rounds.pop(index, None)
        if entered is None:
            # Not a member: all that was learned here since the last common state is still to be merged.
            drift = self.local_fragment(index) - self.common[index]
        else:
            drift = self.local_fragment(index) - entered.sent
            self._since_commit[index] = (entered.steps, entered.tokens)
        self.common[index], self.momentum[index] = fragment, momentum
        self._write(self.fragments[index], fragment + drift)

    def abandon_round(self, index: int) -> None:
        """A round ended without a commit: nothing changes, training goes on."""
        self._rounds.pop(index, None)

    def reset_fragment(self, index: int, fragment: Tensor, momentum: Tensor) -> None:
        """Take the swarm's state and drop local drift: for a peer that joins or fell behind."""
        self._rounds.pop(index, None)
        self.common[index], self.momentum[index] = fragment, momentum
        self._since_commit[index] = (self.step, self.tokens)
        self._write(self.fragments[index], fragment)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> SlotTensors:
    """The tensors whose name starts with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
