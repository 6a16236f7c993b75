"""The auditor's arithmetic: a worker's step taken again from its record, with the code that workers run.

What can be known without computing is checked before (`protocol/experts/auditing.py`). The owner's word is taken for
the state before the step, for the sketches of others and the older stand-ins that they were taken at, and for the clip
factor, which is over slots that no record shows: only bounds of these are checked. What comes out must be what the
owner says came out, but for rounding.

    ||after - recomputed||  <=  tolerance ||recomputed - before||  +  ROUNDING ||before||        in every matrix
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from ...kernels.experts import OwnedExpert, run_expert
from ...kernels.interface import check_tensor
from ...kernels.lora import LoraExpert
from ...kernels.sketch import RowSketch
from ...kernels.standin import Menu, StandIn
from ...protocol.errors import Refused, ShoalError
from ...protocol.experts.auditing import Finding
from ...protocol.messages import AuditRecord, SlotState
from ..learning.expert_mode import SAVED, ExpertMode
from ..learning.optimizer import checked_state, experts_group, put_state, set_rate
from ..learning.worker import CLIP_EPSILON, Worker
from ..model.init import expert_shape
from ..run.manifest import Manifest
from ..sketches.sketching import MAX_ROWS
from ..slots.slot_state import SlotTensors, under
from ..storage.blobs import from_bytes

ROUNDING = 1e-6  # of a float32 weight
RATE_ERROR = 1e-6  # relative
STEP_FACTOR, STEP_SLACK = 1.25, 200  # composers tell their steps every few seconds
MIN_ROWS = 32  # fidelity on fewer tells little
COPIES = frozenset({"lowbit", "ternary", "shared"})  # kinds that do an expert's work on any rows, not routed ones only


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the auditor knows by itself."""

    published: Mapping[int, Mapping[bytes, bytes]]  # by seq and handle, stand-ins as gossiped: the last ones, or two
    steps: Collection[int]  # where the composers are


def judge(record: AuditRecord, manifest: Manifest, known: Known, menu: Menu) -> Finding:
    """Take the step again. Never raises for anything in `record`.

    Args:
        record: whose claims passed.
        menu: of the run's stand-ins.
    """
    try:
        replay = Replay(manifest, record, menu)
        theirs = [from_bytes(expert.after, what="weights") for expert in record.experts]
        after = [replay._checked_expert(p, _named(p, tensors)) for p, tensors in enumerate(theirs)]
        sketches = [
            [
                RowSketch.from_bytes(sketch.rows, hidden=replay.shape.hidden, max_rows=MAX_ROWS)
                for sketch in expert.sketches
            ]
            for expert in record.experts
        ]
        owned = replay.experts_of(0)
        trained_before = [[tensor.detach().clone() for tensor in expert.trained] for expert in owned]
        weights_before = [_copied(expert.dense()) for expert in owned]
        if record.seq in known.published:
            published = known.published[record.seq]
            if any(published.get(expert.handle, expert.standin) != expert.standin for expert in record.experts):
                return Finding.OTHER_STANDIN
        if not _on_schedule(record, replay, known.steps):
            return Finding.WRONG_RATE
        if manifest.sketch.kind == "rows" and manifest.train.optimizer != "adamw8bit":
            found = replay.take(sketches)
            if found is not Finding.PASSED:
                return found
            for before, mine, their in zip(trained_before, owned, after, strict=True):
                triples = zip(before, mine.trained, their.trained, strict=True)
                if not _same_base(mine, their):
                    return Finding.WRONG_UPDATE
                if not all(_same_update(*each, manifest.trust.tolerance) for each in triples):
                    return Finding.WRONG_UPDATE
        newest = known.published[max(known.published)] if known.published else {}
        for position, expert in enumerate(record.experts):
            standins = [menu.load(newest.get(expert.handle, expert.standin))]
            standins += replay.versions[position][1:]
            x_ND = torch.cat([torch.empty(0, replay.shape.hidden), *(s.x.dense() for s in sketches[position])])
            computed = [weights_before[position], after[position].dense()]
            for standin in standins:
                fidelities = [_fidelity(x_ND, weights, standin, replay.shape.act) for weights in computed]
                if max(fidelities) < manifest.trust.min_fidelity:
                    return Finding.POOR_STANDIN
    except (ShoalError, ValueError):
        return Finding.MALFORMED
    return Finding.PASSED


def judge_weights(state: SlotState, manifest: Manifest, published: Sequence[bytes], menu: Menu) -> Finding:
    """Whether published stand-ins do the work of the weights that their owner says it has. Never raises.

    Args:
        state: answer to `weights/<slot>`.
        published: as gossiped, in the wire's order.
    """
    shape = expert_shape(manifest.model)
    try:
        tensors = from_bytes(state.tensors, what="weights")
        for place, data in enumerate(published):
            weights = tensors[f"{place}.gate_up"], tensors[f"{place}.down"]
            sizes = (2 * shape.width, shape.hidden), (shape.hidden, shape.width)
            for tensor, size in zip(weights, sizes, strict=True):
                check_tensor("weights", tensor, torch.float32, size)
            nothing = torch.empty(0, shape.hidden)
            # These are what the expert computes with already.
            if _fidelity(nothing, weights, menu.load(data), shape.act) < manifest.trust.min_fidelity:
                return Finding.POOR_STANDIN
    except (Refused, ValueError, KeyError):
        return Finding.MALFORMED
    return Finding.PASSED


def _copied(weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    gate_up, down = weights
    return gate_up.detach().clone(), down.detach().clone()


def _same_base(mine: OwnedExpert, their: OwnedExpert) -> bool:
    """Whether all that is not trained stayed what it was, and what is trained kept its shapes."""
    if any(a.shape != b.shape for a, b in zip(mine.trained, their.trained, strict=True)):
        return False
    if not isinstance(mine, LoraExpert) or not isinstance(their, LoraExpert):
        return True
    ours, theirs = mine.base.tensors, their.base.tensors
    return mine.scale == their.scale and all(torch.equal(value, theirs[name]) for name, value in ours.items())


class Replay(Worker):
    """A worker of the record's experts alone, as slot 0, in the record's order.

    Raises:
        ValueError, Refused: the record's state is malformed.
    """

    def __init__(self, manifest: Manifest, record: AuditRecord, menu: Menu) -> None:
        states_before = [from_bytes(expert.before, what="state") for expert in record.experts]
        low_rank = any(name.startswith(SAVED) for state in states_before for name in state)
        mode = ExpertMode(manifest.train, "lora" if low_rank else "full")
        super().__init__(manifest, composers=dict, mode=mode, bases=menu.bases)
        self.record = record
        self.shape = msgspec.structs.replace(self.shape, num_layers=len(record.experts))
        self.step = record.step
        experts, states = [], []
        group = experts_group(self.optimizer)
        for position, told in enumerate(states_before):
            tensors = _named(position, told)
            expert = self._checked_expert(position, tensors)
            prefix = f"{position}." + (SAVED if low_rank else "")
            experts.append(expert)
            states.append([
                checked_state(self.optimizer, group, weights.shape, under(f"{prefix}{name}.", tensors))
                for name, weights in zip(expert.names, expert.trained, strict=True)
            ])  # fmt: skip
        # By position: what was published when the step was taken, then earlier ones.
        self.versions = [[menu.load(data) for data in (expert.standin, *expert.past)] for expert in record.experts]
        publishers = self._make_publishers(0, [versions[0] for versions in self.versions])
        held = self._hold(0, experts)
        self._begin_owning(0, held, publishers)
        for taken, of_expert in zip(held, states, strict=True):
            for parameter, state in zip(taken.trained, of_expert, strict=True):
                put_state(self.optimizer, parameter, state)

    def _taken_at(self, slot: int, position: int, age: int) -> StandIn:
        return self.versions[position][age]

    def take(self, sketches: list[list[RowSketch]]) -> Finding:
        """The recorded step. ValueError for a sketch that no owner could have taken in."""
        for position, expert in enumerate(self.record.experts):
            for used, sketch in zip(expert.sketches, sketches[position], strict=True):
                if sketch.pairs > used.tokens or used.past > len(expert.past):
                    return Finding.MALFORMED
                self.absorb(0, position, sketch, used.tokens, used.past)
        self._set_gradients(0, [0])
        trained = [w for expert in self.experts_of(0) for w in expert.trained if w.grad is not None]
        norm = torch.nn.utils.get_total_norm([w.grad for w in trained if w.grad is not None])
        # Other slots were stepped with these, so the norm was this large at least.
        most = min(1.0, self.train.grad_clip / (float(norm) + CLIP_EPSILON))
        if self.record.clip > most * (1 + self.manifest.trust.tolerance):
            return Finding.WRONG_CLIP
        for weights in trained:
            assert weights.grad is not None
            weights.grad.mul_(self.record.clip)
        set_rate(self.optimizer, self.record.learning_rate)
        self.optimizer.step()
        return Finding.PASSED


def _named(position: int, tensors: Mapping[str, Tensor]) -> SlotTensors:
    return {f"{position}.{name}": value for name, value in tensors.items()}


def _on_schedule(record: AuditRecord, replay: Replay, steps: Collection[int]) -> bool:
    """Whether the learning rate is that of the step named, and the slowest composer may not be far beyond that step.

    An owner never goes back, so its step may be far beyond those of composers that have all begun anew.
    """
    wanted = replay.learning_rate()
    if abs(record.learning_rate - wanted) > RATE_ERROR * wanted:
        return False
    low, last = min(steps, default=0), replay.train.steps
    return min(low, last) <= record.step * STEP_FACTOR + STEP_SLACK and record.step <= last


@torch.no_grad()
def _same_update(before: Tensor, mine: Tensor, theirs: Tensor, tolerance: float) -> bool:
    error, moved, size = (
        float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (theirs - mine, mine - before, before)
    )
    return error <= tolerance * moved + ROUNDING * size  # false for NaN


@torch.no_grad()
def _fidelity(x_ND: Tensor, weights: tuple[Tensor, Tensor], standin: StandIn, act: str) -> float:
    """1 - ||E(x) - S(x)|| / ||E(x)||, of what the expert computes with; 1 where it cannot be told."""
    if len(x_ND) < MIN_ROWS and standin.kind in COPIES:
        rng = torch.Generator().manual_seed(0)
        x_ND = torch.cat([x_ND, torch.randn(4 * MIN_ROWS, weights[1].shape[0], generator=rng)])
    if len(x_ND) < MIN_ROWS:
        return 1.0
    y_ND = run_expert(x_ND, *weights, act)
    size = float(torch.linalg.vector_norm(y_ND))
    error = float(torch.linalg.vector_norm(y_ND - run_expert(x_ND, *standin.dense(), act)))
    return 1.0 - error / size if size > 0 else 1.0
