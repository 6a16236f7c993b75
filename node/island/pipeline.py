"""An island whose processes are stages of one model: each computes some of its layers, for all of a step's batch.

    leader: stage 0             member 1                         last member
        weights of stages  -->
        batch, what changes ~~>                                      ~~> targets
        microbatches       ==>  activations  ==>     ...      ==>    loss
                           <==  their gradients  <==  ...     <==
        gradients          <--  counts, rows of others and own  <~~

--> by torch.distributed, ==> by its pipelining (`PipelineStage`, `ScheduleGPipe`), ~~> by pipes. A step is over the
same batch as one process's, and comes to the same: `model/stages.py` says how router losses do. Where experts have a
capacity (`model.capacity_factor`), a batch is one microbatch, for which tokens are dropped depends on all of them.

Members hold the weights, gradients and activations of their own layers, and no more. The leader, which is the peer,
still has all weights, their gradients and optimizer states, but activations of its own layers only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from ..errors import ConfigError
from ..learning.composer import Computed
from ..model.stages import Span, Stage, Weighing, build_stage, check_stages, spans
from .leader import Island
from .orders import Setup, StageStep, packed_gradients, unpack_gradients
from .replica import Answer, Replica, experts_in, fill, flat, numel
from .rows import Rows, StepRows, give, wanted_by

if TYPE_CHECKING:
    from ..learning.composer import Composer

# At most. Of 2 stages each then waits for a third of the time. More would overlap better, but experts cost by the call
# more than by the token, and every microbatch unpacks all stand-ins anew.
MICROBATCHES_A_STAGE = 1


def microbatches(sequences: int, stages: int, capacity_factor: float) -> int:
    """Into how many a batch is cut: all are of one size."""
    most = 1 if capacity_factor > 0 else MICROBATCHES_A_STAGE * stages
    return max(count for count in range(1, min(most, sequences) + 1) if sequences % count == 0)


def trained_of(stage: Stage, owned: set[int]) -> list[nn.Parameter]:
    """What of a stage the leader's optimizer moves, in an order that both sides know."""
    return [*stage.backbone.values(), *experts_in(stage.shards, owned)]


Observed = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by layer and slot: x (N, D), gate (N)


class OwnedRows:
    """Rows that one step routes to owned experts, microbatch after microbatch: in the order of one batch's."""

    def __init__(self) -> None:
        self._rows: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, layer: int, slot: int, x_ND: Tensor, gate_N: Tensor) -> None:
        """The shard's `OwnedRowsTap`."""
        self._rows[layer, slot].append((x_ND, gate_N))

    def take(self) -> Observed:
        rows, self._rows = self._rows, defaultdict(list)
        return {
            at: (torch.cat([x for x, _ in parts]).cpu(), torch.cat([gate for _, gate in parts]).cpu())
            for at, parts in rows.items()
        }


@dataclass(frozen=True)
class StageDone:
    """A member's answer."""

    counts_LE: Tensor  # pairs routed in its MoE layers
    others: Rows
    own: Observed


class Runner:
    """One process's part in computing a batch; all run at the same time.

    Raises RuntimeError if another one is gone.
    """

    def __init__(self, stage: Stage, rank: int, size: int, device: torch.device) -> None:
        self.stage = stage
        self._rank, self._size, self._device = rank, size, device
        self._hidden = int(stage.network.config.get_text_config().hidden_size)
        self._shape: tuple[int, ...] = ()

    def run(self, batch: Tensor, weighing: Weighing) -> Tensor:
        """Forward and backward of all microbatches of tokens (B, S). Returns the loss if this stage has it, else 0."""
        if self._shape != (*batch.shape, weighing.microbatches):
            self._shape = (*batch.shape, weighing.microbatches)
            self._schedule = self._schedule_of(batch, weighing.microbatches)
        self.stage.begin(weighing)
        span, losses = self.stage.span, list[Tensor]()
        if span.is_last:
            self._schedule.step(target=batch, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*[batch] if span.is_first else [])
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self._device)

    def _schedule_of(self, batch: Tensor, count: int) -> ScheduleGPipe:
        """Shapes are told, not tried out: a forward has effects here."""
        span, meta = self.stage.span, torch.device("meta")
        tokens = torch.empty(batch.shape[0] // count, batch.shape[1], dtype=torch.int64, device=meta)
        passed = torch.empty(*tokens.shape, self._hidden, device=meta, requires_grad=True)
        logits = torch.empty(*tokens.shape, self.stage.network.config.get_text_config().vocab_size, device=meta)
        stage = PipelineStage(
            self.stage, self._rank, self._size, self._device,
            input_args=tokens if span.is_first else passed,
            output_args=logits.requires_grad_() if span.is_last else passed,
        )  # fmt: skip
        return ScheduleGPipe(stage, count, loss_fn=self.stage.loss, scale_grads=False)


class Pipeline(Island):
    """The leader's side.

    Args:
        spans: of the stages, by rank.
    """

    form = "pipeline"

    def __init__(self, *args: Any, spans: list[Span], **more: Any) -> None:
        super().__init__(*args, **more)
        self._spans = spans
        self._runner: Runner | None = None

    def serve(self, composer: Composer) -> None:
        try:
            check_stages(composer.model, self._spans)
        except ValueError as error:
            raise ConfigError(f"island_form = 'pipeline': {error}", fix="leave --island-form out") from error
        super().serve(composer)

    def form_with(self, composer: Composer) -> bool:
        before = self.together
        formed = super().form_with(composer)
        if formed and not before:
            self._stages = [Stage(composer.model, span) for span in self._spans]
            self._runner = Runner(self._stages[0], 0, self.size, composer.device)
            self._rows, self._own = StepRows(composer.manifest, 0), OwnedRows()
        return formed

    def _compute(self, composer: Composer) -> Computed:
        assert self._runner is not None
        changed, collector, device = self.changed(composer), composer.collector, composer.device
        wanted, observing = wanted_by(collector), composer.observing
        batch, train = composer.next_batch(), composer.train
        count = microbatches(len(batch), self.size, composer.manifest.model.capacity_factor)
        weighing = Weighing(composer.swarm_counts, train.balance_coef, train.z_coef, count)
        sending = []
        theirs = list(zip(self.members, self._stages[1:], strict=True))
        for rank, (member, stage) in enumerate(theirs, start=1):
            layers = range(stage.shards[0].layer, stage.shards[-1].layer + 1)
            slots = {slot: now.part(layers) for slot, now in changed.items()}
            self.tell(member, StageStep(batch, weighing, wanted, observing, slots))
            weights = flat(trained_of(stage, composer.owned))
            sending.append((dist.isend(weights, rank), weights))
        composer.model.set_sketch_tap(self._rows.tap(wanted, batch.numel()))
        self._own.take()
        composer.model.set_tap(self._own.add if observing else None)
        self._runner.run(batch.to(device), weighing)
        for work, _ in sending:
            assert work is not None
            work.wait()
        loss = 0.0
        for rank, (_, stage) in enumerate(theirs, start=1):
            parameters = trained_of(stage, composer.owned)
            packed = torch.empty(numel(parameters) + len(parameters) + 1, device=device)
            dist.recv(packed, rank)
            loss += unpack_gradients(parameters, packed).item()
        answers: list[StageDone] = [self.hear(member) for member in self.members]
        if collector is not None:  # nothing can fail from here on
            give(collector, [self._rows.take(), *(answer.others for answer in answers)], batch.numel(), 1, device)
        for own in (self._own.take(), *(answer.own for answer in answers)):
            for (layer, slot), rows in own.items():
                composer.observe(layer, slot, *rows)
        counts_LE = torch.cat([self._stages[0].counts_LE.cpu(), *(answer.counts_LE for answer in answers)])
        return Computed(loss, batch.numel(), counts_LE, self.size)


class StageReplica(Replica):
    """A member's: forward and backward of some layers."""

    def __init__(self, setup: Setup) -> None:
        spec, rank = setup.manifest.model, setup.rank
        span = spans(spec, setup.size)[rank]
        super().__init__(setup, build_stage(spec, span, expert=setup.mode))
        self._stage = Stage(self.model, span)
        self._runner = Runner(self._stage, rank, setup.size, self.device)
        self._own = OwnedRows()

    def step(self, order: StageStep, answer: Answer) -> None:
        self.change(order.slots)
        parameters = trained_of(self._stage, self.owned)
        weights = torch.empty(numel(parameters), device=self.device)
        dist.recv(weights, 0)
        fill(parameters, weights)
        del weights
        self.model.set_sketch_tap(self.rows.tap(order.rows, order.batch.numel()))
        self.model.set_tap(self._own.add if order.observing else None)
        loss = self._runner.run(order.batch.to(self.device), order.weighing)
        dist.send(packed_gradients(parameters, loss), 0)
        for parameter in parameters:
            parameter.grad = None
        answer(StageDone(self._stage.counts_LE.cpu(), self.rows.take(), self._own.take()))
