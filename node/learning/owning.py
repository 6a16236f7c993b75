"""Owning experts: what a composer and a worker have in common.

An owner holds its slots' experts in full, with optimizer state, and publishes their stand-ins. It learns from two
sources. A composer's own backward pass gives the mean gradient over its N tokens. Sketches of others give sums over
the tokens that they stand for, already weighed by how much they tell (`kernels/sketch.py`). Before each step both
become one mean over all tokens, whoever computed them:

    g = (N g_own + Σ_j ρ_j G_j) / (N + Σ_j ρ_j N_j)

What was summed over many steps before it was sent is shared out over as many (`sketches/shares.py`).

Experts are named by slot and position. For a composer the position is the layer; a worker does not know layers, its
positions are the order of the handles that the slot has under its present lease (`protocol/experts/handles.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...kernels.experts import DenseExpert, OwnedExpert
from ...kernels.interface import check_tensor
from ...kernels.lora import LoraExpert
from ...kernels.sign_sketch import SignSketch
from ...kernels.sketch import RowSketch
from ...kernels.standin import Publisher, StandIn
from ..audits.step_record import StepRecorder, Used
from ..run.manifest import Manifest, TrainSpec
from ..sketches.shares import Gradient, Shares, SummedGradient
from ..sketches.sketch_sums import SketchSum, check_gradient
from ..sketches.sketching import Sketch
from ..slots.slot_state import SlotTensors, optimizer_state, under, weights_as_trained
from ..standins.standin_owner import StandInOwner
from .expert_mode import SAVED, ExpertMode
from .optimizer import checked_state, experts_group, learning_rate, put_state

Owner = TypeVar("Owner", bound="ExpertOwner")  # a composer or a worker
_ALL = ""  # in place of a sender: the mean over all


class ExpertOwner(StandInOwner):
    """Holds the experts of `owned` slots. All of it belongs to the training thread."""

    optimizer: torch.optim.Optimizer  # `experts_group` of it takes the experts
    processes = 1  # that compute a step together on this machine

    def __init__(self, manifest: Manifest, *, fit_seed: int, mode: ExpertMode | None = None) -> None:
        super().__init__(manifest, fit_seed=fit_seed)
        self.mode = mode or ExpertMode(manifest.train)
        self.train: TrainSpec = manifest.train
        self.num_slots = self.shape.num_experts
        self.step = 0
        self.recorder = StepRecorder()
        self._frozen: set[int] = set()  # owned, but in the middle of a handover: not trained
        self._sums: dict[tuple[int, int], SketchSum] = {}  # by slot and position
        self.shares: dict[tuple[int, int], Shares] = {}  # likewise, what is still to be learned from
        self.heard_tokens: defaultdict[tuple[int, int], float] = defaultdict(float)  # of sketches
        self.dropped_sketches = 0  # of which what they teach was not finite or absurdly large, ever

    @property
    def frozen(self) -> Collection[int]:
        """Owned slots that are not trained now."""
        return self._frozen

    @abstractmethod
    def _hold(self, slot: int, experts: Sequence[OwnedExpert]) -> list[OwnedExpert]:
        """Make parameters of what of them is trained."""

    @abstractmethod
    def _let_go(self, slot: int, published: Sequence[StandIn]) -> None:
        """Forget the experts of a slot."""

    @abstractmethod
    def first_experts(self, slot: int) -> list[DenseExpert]:
        """Experts to start a slot with of which nobody has a copy. ValueError where they cannot be known."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether there is a step to take now."""

    @abstractmethod
    def train_step(self) -> Any:
        """Take it; returns what there is to report."""

    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.train, self.step)

    # -- sketches --------------------------------------------------------------------------------------------------

    def hear(
        self, sender: str, slot: int, sketches: Mapping[int, Sketch], *, tokens: int, step: int, age: int = 0
    ) -> None:
        """Take in one composer's sketches of a slot, by position, of its inner steps up to `step`.

        Args:
            age: versions that were published since the stand-ins that the rows were taken at.

        Raises:
            ValueError: see `absorb` and `absorb_gradient`; the slot's other positions may have taken theirs in.
        """
        for position, sketch in sketches.items():
            if isinstance(sketch, SignSketch):
                self._share_out(slot, position, sender, sketch, tokens=tokens, rows=sketch.pairs)
                continue
            self.absorb(slot, position, sketch, tokens, age)
            used = Used(sender, step, tokens, sketch, self._taken_at(slot, position, age))
            self.recorder.note(slot, position, used)

    def hear_mean(
        self, sender: str, slot: int, gradients: Mapping[int, tuple[Tensor, Tensor]], *, tokens: float, step: int
    ) -> None:
        """Take in the mean gradients of a slot's experts, d gate_up and d down by position, over all composers' tokens.

        Args:
            sender: one of these composers.
            tokens: that the mean is over.
            step: of the sender, up to which its part goes.

        Raises:
            ValueError: see `absorb_gradient`; other positions may have taken theirs in.
        """
        for position, (d_gate_up, d_down) in gradients.items():
            routed = bool(d_gate_up.any() or d_down.any())
            summed = SummedGradient(d_gate_up * tokens, d_down * tokens)
            self._share_out(slot, position, _ALL, summed, tokens=tokens, rows=int(routed))

    def absorb(self, slot: int, position: int, sketch: RowSketch, tokens: int, age: int = 0) -> None:
        """Take in what another peer's tokens teach one expert; the next step uses it, unless it would spoil the step.

        Args:
            sketch: of the rows routed to it, possibly none.
            tokens: over which they were routed, whether to this expert or not.
            age: see `hear`.

        Raises:
            ValueError: the slot is not owned, or the tokens come to nothing; nothing has changed then.
        """
        self.experts_of(slot)
        held = self._sums.get((slot, position)) or SketchSum()
        held.add(sketch, tokens, self._taken_at(slot, position, age))
        self._sums[slot, position] = held
        if held.is_full:
            self._settle(slot, position)

    def absorb_gradient(
        self, slot: int, position: int, d_gate_up: Tensor, d_down: Tensor, *, tokens: float, rows: int
    ) -> None:
        """Like `absorb`, with the gradient itself, summed over tokens.

        Raises:
            ValueError: the slot is not owned, or the gradient is not finite, absurdly large, or of tokens that come to
                nothing; nothing has changed then.
        """
        expert, held = self.experts_of(slot)[position], self._sums.get((slot, position)) or SketchSum()
        try:
            held.add_gradient(expert, d_gate_up, d_down, tokens=tokens, rows=rows)
        except ValueError as error:
            raise ValueError(f"slot {slot}: {error}") from error
        self._sums[slot, position] = held

    @property
    def shared_steps(self) -> int:
        """Over which what one interval teaches is shared out."""
        return self.manifest.sketch.interval

    def _share_out(
        self, slot: int, position: int, sender: str, gradient: Gradient, *, tokens: float, rows: int
    ) -> None:
        """Take in a gradient that `sender` summed over an interval. Raises ValueError as `absorb_gradient` does."""
        if self.shared_steps == 1:
            self.absorb_gradient(slot, position, *gradient.dense(), tokens=tokens, rows=rows)
            return
        self.experts_of(slot)
        gradient = gradient.small()  # as it is kept: rounded, it may be larger
        try:
            check_gradient(*gradient.dense(), tokens=tokens / (2 * self.shared_steps))  # the least of a share
        except ValueError as error:
            raise ValueError(f"slot {slot}: {error}") from error
        shares = self.shares.setdefault((slot, position), Shares(self.shared_steps))
        shares.put(sender, gradient, tokens=tokens, rows=rows)

    def _take_shares(self, slot: int, position: int) -> None:
        """What the next step is to learn of what is shared out."""
        shares = self.shares.get((slot, position))
        for share in [] if shares is None else shares.of_step():
            d_gate_up, d_down = (matrix / share.steps for matrix in share.gradient.dense())
            self.absorb_gradient(slot, position, d_gate_up, d_down, tokens=share.tokens, rows=share.rows)

    def _settle(self, slot: int, position: int) -> SketchSum | None:
        """What the expert was told, added up; None if nothing was."""
        held = self._sums.get((slot, position))
        if held is not None:
            publisher, expert = self.publishers[slot][position], self.experts_of(slot)[position]
            spec = self.manifest.sketch
            held.settle(expert, publisher, self.shape.act, spec.kappa, spec.curvature)
            self.dropped_sketches += held.dropped
            held.dropped = 0
        return held

    def _taken_at(self, slot: int, position: int, age: int) -> StandIn:
        return self.past.at(slot, position, age)

    @torch.no_grad()
    def _set_gradients(self, own_tokens: int, slots: Collection[int]) -> None:
        """Turn the experts' own mean gradients and the sums of sketches into one mean."""
        for slot in slots:
            for position, expert in enumerate(self.experts_of(slot)):
                if slot in self._frozen:
                    self._sums.pop((slot, position), None)
                    self.shares.pop((slot, position), None)
                    for weights in expert.trained:
                        weights.grad = None
                    continue
                self._take_shares(slot, position)
                held = self._settle(slot, position)
                self._sums.pop((slot, position), None)
                self.heard_tokens[slot, position] += 0.0 if held is None else held.tokens
                own = any(weights.grad is not None for weights in expert.trained)
                if held is not None and held.gradients is not None and (held.rows or own):
                    total = own_tokens + held.tokens
                    for weights, theirs in zip(expert.trained, held.gradients, strict=True):
                        theirs = theirs.to(weights.device)
                        if weights.grad is not None:
                            theirs.add_(weights.grad, alpha=own_tokens)
                        weights.grad = theirs.div_(total)

    def _show_rows(self, slot: int, position: int) -> None:
        self._settle(slot, position)

    def published_by_default(self) -> set[int]:
        return self.owned - self._frozen

    # -- ownership -------------------------------------------------------------------------------------------------

    def _begin_owning(self, slot: int, experts: Sequence[OwnedExpert], publishers: list[Publisher]) -> None:
        self._begin_publishing(slot, publishers)
        group = experts_group(self.optimizer)
        group["params"].extend(t for expert in experts for t in expert.trained)

    def snapshot(self, slot: int) -> SlotTensors:
        """What another peer needs to own the slot: weights, publisher state, and optimizer state where all weights are
        trained. Copies, by name."""
        tensors: SlotTensors = {}
        for position, expert in enumerate(self.experts_of(slot)):
            for name, weights in zip(("gate_up", "down"), expert.masters(), strict=True):
                tensors[f"{position}.{name}"] = weights.detach().to("cpu", copy=True)
            if isinstance(expert, DenseExpert):
                state = optimizer_state(self, slot, position)
                tensors |= {f"{position}.{name}": value for name, value in state.items()}
            tensors |= self._publisher_state(slot, position)
        return tensors

    def saved(self, slot: int) -> SlotTensors:
        """What this peer needs to go on with an owned slot where it was, for its own checkpoint. Copies, by name."""
        tensors: SlotTensors = {}
        for position in range(self.shape.num_layers):
            state = weights_as_trained(self, slot, position) | optimizer_state(self, slot, position)
            tensors |= {f"{position}.{name}": value for name, value in state.items()}
            tensors |= self._publisher_state(slot, position)
        return tensors

    def weights(self, slot: int) -> SlotTensors:
        """What an owned slot's experts compute with: `<position>.gate_up` and `<position>.down`. Copies."""
        tensors: SlotTensors = {}
        for position, expert in enumerate(self.experts_of(slot)):
            gate_up, down = expert.dense()
            tensors[f"{position}.gate_up"] = gate_up.detach().to("cpu", copy=True)
            tensors[f"{position}.down"] = down.detach().to("cpu", copy=True)
        return tensors

    def updates(self, slot: int) -> int:
        """Optimizer steps that its experts have had, added up, whoever owned them.

        It begins anew where only weights came: from a standby's copy, or with `ownership.handover = "snapshot"`.
        """
        states = (self.optimizer.state.get(t, {}) for expert in self.experts_of(slot) for t in expert.trained[:1])
        return sum(int(state.get("step", 0)) for state in states)

    def freeze(self, slot: int) -> None:
        """Stop training an owned slot while a copy of it travels to its next owner. ValueError if it is not owned."""
        if slot not in self.publishers:
            raise ValueError(f"slot {slot} is not owned")
        self._frozen.add(slot)
        self._set_aside(slot)  # its next owner goes on from what is published now

    def thaw(self, slot: int) -> None:
        """The handover did not happen: train on."""
        self._frozen.discard(slot)

    def adopt(self, slot: int, tensors: SlotTensors | None, published: Sequence[StandIn] | None = None) -> None:
        """Become the owner of `slot`.

        Args:
            tensors: from `snapshot` or `saved`; None restarts the slot from `first_experts`.
            published: what the others hold, by position; by default what this peer ran for the slot so far.

        Raises:
            ValueError: the snapshot or `published` does not fit this model or is not finite; nothing has changed then.
        """
        if slot in self.publishers:
            raise ValueError(f"slot {slot} is owned already")
        published = self.standins(slot) if published is None else published
        # Everything that can fail comes before the first change: half a slot would end the training.
        if tensors is None:
            experts: list[OwnedExpert] = [self.mode(*expert.masters()) for expert in self.first_experts(slot)]
        else:
            experts = [self._checked_expert(position, tensors) for position in range(self.shape.num_layers)]
        publishers = self._make_publishers(slot, published)
        states: list[list[dict[str, Tensor | int]]] = [[{} for _ in expert.trained] for expert in experts]
        if tensors is not None:
            group = experts_group(self.optimizer)
            full = any(name.count(".") > 1 for name in tensors)  # else in a wire format, which has weights only
            for position, (expert, publisher) in enumerate(zip(experts, publishers, strict=True)):
                place = f"{position}." + (SAVED if isinstance(expert, LoraExpert) else "")
                states[position] = [
                    checked_state(self.optimizer, group, weights.shape, under(f"{place}{name}.", tensors))
                    for name, weights in zip(expert.names, expert.trained, strict=True)
                ]
                if full:
                    self._restore_publisher(publisher, under(f"{position}.publisher.", tensors))
        held = self._hold(slot, experts)
        self._begin_owning(slot, held, publishers)
        for expert, of_expert in zip(held, states, strict=True):
            for parameter, state in zip(expert.trained, of_expert, strict=True):
                put_state(self.optimizer, parameter, state)

    def _checked_expert(self, position: int, tensors: SlotTensors) -> OwnedExpert:
        width, hidden = self.shape.width, self.shape.hidden
        saved = under(f"{position}.{SAVED}", tensors)
        if saved:
            expert = self.mode.read(saved, hidden, width)
            for matrix in expert.dense():
                check_tensor(f"layer {position}'s weights", matrix, torch.float32, tuple(matrix.shape))
            return expert
        weights = []
        for name, shape in (("gate_up", (2 * width, hidden)), ("down", (hidden, width))):
            value = tensors.get(f"{position}.{name}")
            if value is None:
                raise ValueError(f"the snapshot lacks layer {position}'s {name}")
            check_tensor(f"layer {position}'s {name}", value, torch.float32, shape)
            weights.append(value)
        return self.mode(*weights)

    def release(self, slot: int) -> None:
        """Stop owning `slot`: from now on the published copy stands in for it."""
        published = self.standins(slot)
        experts = self.experts_of(slot)
        gone = {id(t) for expert in experts for t in expert.trained}
        group = experts_group(self.optimizer)
        group["params"] = [p for p in group["params"] if id(p) not in gone]
        for position, expert in enumerate(experts):
            for parameter in expert.trained:
                self.optimizer.state.pop(parameter, None)
            self._sums.pop((slot, position), None)
            self.shares.pop((slot, position), None)
        self._end_publishing(slot)
        self._frozen.discard(slot)
        self._let_go(slot, published)
