"""Which kind of sketches a run should use, by what a composer may send. Pure.

    rows       tokens * top-k * layers * (share not owned here) of them a step; each 2 d bytes and a little more
    gradient   slots * layers vectors an interval, whatever the tokens; each about 3 r (d + f) bytes

Rows are exact but for the codec, a sample of them is still right on average, and the owner can correct what they say.
Four bits of all rows teach more than eight bits of half of them, so rows are made coarser before any is left out. A
hundredth of the rows still helped where gradient sketches did not; below that nothing was measured. Signs are never
chosen: in real peers, where they are a step late, as many bytes of rows taught more (docs/evidence/sketches.md). A
gradient sketch goes through an all-reduce, which sends an input once and the results of the own part once, so it counts
twice where it is brought.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ...kernels.gradient_sketch import largest_rank, sketch_numel
from ...kernels.sketch import row_bytes
from ..model.init import expert_shape, experts_per_token
from ..run.manifest import Manifest, SketchSpec

LEAST_ROWS = 0.01  # share of the rows that must fit for rows to be chosen before gradient sketches
LEAST_RANK = 4  # of gradient sketches; intervals are stretched to make room for it
LONGEST_INTERVAL = 100  # inner steps


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a composer's step teaches the experts of others.

    Attributes:
        hidden, width, num_layers, num_slots, top_k: of the routed experts.
        tokens: of one composer's step.
        owned_share: of the slots that this composer owns itself.
    """

    hidden: int
    width: int
    num_layers: int
    num_slots: int
    top_k: int
    tokens: int
    owned_share: float = 0.0

    def row_bytes(self, spec: SketchSpec) -> float:
        """Of all rows of one step, as sampled ones travel."""
        rows = self.tokens * self.top_k * self.num_layers * (1.0 - self.owned_share)
        return rows * row_bytes(self.hidden, spec.codec)

    def gradient_bytes(self, rank: int) -> float:
        """That leave a composer in one interval, in int8: twice for slots of others, once as the owner of its own."""
        times = 2.0 * (1.0 - self.owned_share) + self.owned_share
        return times * self.num_slots * self.num_layers * sketch_numel(self.hidden, self.width, rank)


def choose_sketches(spec: SketchSpec, traffic: Traffic, *, budget_bytes: int, gradients: bool) -> SketchSpec:
    """`spec` with the kind, and its size, that fits a budget.

    Args:
        budget_bytes: that a composer may send for sketches in one inner step, on average.
        gradients: whether the run's stand-ins allow sketches of gradients; else it is rows, however few.

    Raises:
        ValueError: the budget holds neither that share of the rows nor a gradient sketch of any use.
    """
    if budget_bytes < 1:
        raise ValueError(f"{budget_bytes} bytes a step hold no sketch")
    if traffic.row_bytes(spec) > budget_bytes:
        spec = min(spec, msgspec.structs.replace(spec, codec="int4"), key=traffic.row_bytes)
    share = budget_bytes / traffic.row_bytes(spec)
    if not gradients or share >= LEAST_ROWS:
        return msgspec.structs.replace(spec, kind="rows", budget_bytes=budget_bytes * spec.every)
    useful = min(LEAST_RANK, largest_rank(traffic.hidden, traffic.width))
    steps = max(spec.gradient_every, -(-int(traffic.gradient_bytes(useful)) // budget_bytes))
    if steps > max(spec.gradient_every, LONGEST_INTERVAL):
        least = -(-int(traffic.gradient_bytes(useful)) // LONGEST_INTERVAL)
        raise ValueError(f"gradient sketches of rank {useful} need {least} bytes a step")
    ranks = range(useful, largest_rank(traffic.hidden, traffic.width) + 1)
    rank = max(rank for rank in ranks if traffic.gradient_bytes(rank) <= steps * budget_bytes)
    return msgspec.structs.replace(spec, kind="gradient", budget_bytes=0, rank=rank, gradient_every=steps)


def traffic_of(manifest: Manifest, *, owned_share: float = 0.0) -> Traffic:
    """What a composer's step in a run is. ValueError for a model that cannot be built."""
    shape = expert_shape(manifest.model)
    return Traffic(
        hidden=shape.hidden,
        width=shape.width,
        num_layers=shape.num_layers,
        num_slots=shape.num_experts,
        top_k=experts_per_token(manifest.model),
        tokens=manifest.train.batch_size * manifest.data.context_length,
        owned_share=owned_share,
    )


def within_budget(manifest: Manifest, budget_bytes: int) -> Manifest:
    """A manifest whose sketches fit `budget_bytes` a composer and step, whoever owns the experts.

    Who will own them is not known when a run is founded, so the worst is assumed: that composers own none.

    Raises ValueError as `choose_sketches` does.
    """
    spec = choose_sketches(
        manifest.sketch,
        traffic_of(manifest),
        budget_bytes=budget_bytes,
        gradients=manifest.standin.whole,
    )
    return msgspec.structs.replace(manifest, sketch=spec)
