"""Routed experts of one layer, forward and backward, beside what else could compute them; for `./dev bench kernels`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ..kernels.bases import Bases
from ..kernels.experts import DenseExpert, ExpertWeights, run_expert
from ..kernels.routed import apply_experts
from ..kernels.standin import KINDS, StandIn, initial_standin
from .timing import interleaved, medians

RANK = 8
# transformers' ways. The batched one copies an expert's weights for every pair: left out where that is much.
THEIRS = ("eager", "batched_mm", "grouped_mm")
MOST_BATCHED = 1 << 30  # bytes


@dataclass(frozen=True)
class Shape:
    """One layer of routed experts."""

    tokens: int  # T
    hidden: int  # D
    width: int  # F
    experts: int  # E
    top_k: int  # K

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden}, {self.experts} experts of {self.width}, top {self.top_k}"

    @property
    def narrow_width(self) -> int:
        """F of a narrow stand-in: a quarter."""
        return max(1, self.width // 4)


FULL = (
    Shape(1024, 64, 64, 16, 2),
    Shape(1024, 64, 64, 64, 4),
    Shape(4096, 256, 128, 64, 8),
    Shape(1024, 512, 256, 32, 4),
    Shape(2048, 1024, 512, 16, 2),
)
QUICK = (Shape(64, 64, 64, 8, 2),)
ON_GPU = (Shape(4096, 256, 128, 64, 8), Shape(16384, 2048, 768, 64, 8))
SQUARE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that is the ceiling


@dataclass(frozen=True)
class ExpertsResult:
    """One shape: median milliseconds of forward and backward by what ran, and ratios to `owned` (above 1: slower).

    `of_ceiling` is the FLOP/s of `owned` over those of one large matrix product.
    """

    shape: Shape
    rounds: int
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    of_ceiling: float


class EmptyTap:
    """What an owner of stand-ins asks for: all rows."""

    def forward_rows(self, expert: int, x_ND: Tensor, gate_N: Tensor) -> None:
        pass

    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        pass


def bench_experts(shape: Shape, seconds: float, device: torch.device, dtype: torch.dtype) -> ExpertsResult:
    """Forward and backward of one layer, gradients to inputs, gates and all weights that are trained."""
    theirs = _transformers(shape).to(device, dtype)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    owned = [
        DenseExpert(
            torch.nn.Parameter(theirs.gate_up_proj[e].detach().clone()),
            torch.nn.Parameter(theirs.down_proj[e].detach().clone()),
        )
        for e in range(shape.experts)
    ]
    dense_width = shape.top_k * shape.width
    dense = (
        torch.nn.Parameter(drawn(2 * dense_width, shape.hidden) * shape.hidden**-0.5),
        torch.nn.Parameter(drawn(shape.hidden, dense_width) * dense_width**-0.5),
    )
    x_TD = drawn(shape.tokens, shape.hidden).requires_grad_()
    gates_TK, index_TK = drawn(shape.tokens, shape.experts).softmax(-1).topk(shape.top_k)
    gates_TK.requires_grad_()
    grad_TD = drawn(shape.tokens, shape.hidden)
    square = drawn(SQUARE[device.type], SQUARE[device.type])
    inputs = (x_TD, gates_TK)

    def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
        return waited(lambda: torch.autograd.grad(forward(), leaves, grad_TD))

    def waited(run: Callable[[], object]) -> Callable[[], object]:
        def to_the_end() -> None:
            run()
            torch.cuda.synchronize(device)

        return run if device.type == "cpu" else to_the_end

    def routed(experts: Sequence[ExpertWeights]) -> Callable[[], object]:
        trained = [w for expert in experts if isinstance(expert, DenseExpert) for w in expert.dense()]
        tap = None if len(trained) == 2 * len(experts) else EmptyTap()
        return step(lambda: apply_experts(x_TD, index_TK, gates_TK, experts, tap=tap), (*inputs, *trained))

    def transformers(way: str) -> Tensor:
        theirs.config._experts_implementation = way
        y_TD: Tensor = theirs(x_TD, index_TK, gates_TK)
        return y_TD

    candidates = {
        "owned": routed(owned),
        "dense": step(lambda: run_expert(x_TD, *dense), (x_TD, *dense)),
        "square": waited(lambda: square @ square),
    }
    their_leaves = (*inputs, theirs.gate_up_proj, theirs.down_proj)
    for way in THEIRS:
        if (
            way != "batched_mm"
            or dtype.itemsize * shape.tokens * shape.top_k * 3 * shape.hidden * shape.width <= MOST_BATCHED
        ):
            candidates[way] = step(functools.partial(transformers, way), their_leaves)
    bases = Bases([owned[0].dense()])
    for kind in KINDS:
        mixed = [
            expert if e % 4 == 0 else first_standin(kind, expert, shape, bases).to(device)
            for e, expert in enumerate(owned)
        ]
        candidates[kind] = routed(mixed)
    times = interleaved(candidates, seconds)
    ratios = {
        name: statistics.median(other / ours for other, ours in zip(values, times["owned"], strict=True))
        for name, values in times.items()
        if name not in ("owned", "square")
    }
    work = 18 * shape.tokens * shape.top_k * shape.hidden * shape.width / (2 * len(square) ** 3)
    of_ceiling = statistics.median(work * s / ours for s, ours in zip(times["square"], times["owned"], strict=True))
    return ExpertsResult(shape, len(times["owned"]), medians(times), ratios, of_ceiling)


def first_standin(kind: str, expert: DenseExpert, shape: Shape, bases: Bases) -> StandIn:
    """Of the sizes that are measured here."""
    return initial_standin(kind, *expert.dense(), shape.narrow_width if kind == "narrow" else RANK, bases=bases)


def _transformers(shape: Shape) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    experts = Qwen3MoeExperts(config)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
    return experts
