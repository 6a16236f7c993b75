"""Row sketches: what they keep of an expert's gradient, for any budget, and what the correction is worth."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from shoal.kernels.experts import DenseExpert, apply_experts, run_expert
from shoal.kernels.sketch import (
    RowBuffer,
    RowCodec,
    RowSketch,
    bytes_per_token,
    expert_gradient,
    kappa_for,
    row_bytes,
)
from torch import Tensor

CODECS: tuple[RowCodec, ...] = ("int8", "float16")
# Relative error of a gradient after the codec, in norm. int8 rounds within half a scale, max|row| / 254.
CODEC_ERROR = {"int8": 0.015, "float16": 0.001}


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    value = random.SystemRandom().randrange(1 << 32)
    print(f"seed {value}")
    with torch.random.fork_rng():
        torch.manual_seed(value)
        random.seed(value)
        yield value


def weights(width: int, hidden: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    down = torch.randn(hidden, width, dtype=dtype) / width**0.5
    return torch.randn(2 * width, hidden, dtype=dtype) / hidden**0.5, down


def rows(num: int, hidden: int) -> tuple[Tensor, Tensor]:
    """x and dy of very different sizes, as routed tokens have them."""
    size = torch.randn(num, 1, dtype=torch.float64).exp()
    return torch.randn(num, hidden, dtype=torch.float64), 1e-2 * size * torch.randn(num, hidden, dtype=torch.float64)


def sketched(x: Tensor, dy: Tensor, codec: RowCodec = "int8", num: int | None = None) -> RowSketch:
    buffer = RowBuffer(x.shape[1], codec)
    buffer.add(x, dy)
    return buffer.take(num)


def autograd(
    gate_up: Tensor, down: Tensor, x: Tensor, dy: Tensor, act: str = "silu", each: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaves = [gate_up.clone().requires_grad_(), down.clone().requires_grad_()]
    y = run_expert(x, leaves[0], leaves[1], act)
    return torch.autograd.grad(y, leaves, dy if each is None else dy * each.unsqueeze(1))  # type: ignore[return-value]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_without_a_budget_the_gradient_is_autograds(codec: RowCodec, act: str) -> None:
    hidden, width = random.randint(8, 64), random.randint(4, 64)
    gate_up, down = weights(width, hidden)
    x, dy = rows(random.randint(20, 300), hidden)
    buffer = RowBuffer(hidden, codec)
    for part in torch.randperm(len(x)).split(random.randint(1, 100)):
        buffer.add(x[part], dy[part])
    sketch = buffer.take(None)
    assert (sketch.num_rows, sketch.pairs, sketch.effective, sketch.weights_N) == (len(x), len(x), 1.0, None)
    assert len(buffer) == 0
    for got, want in zip(expert_gradient(gate_up, down, sketch, act), autograd(gate_up, down, x, dy, act), strict=True):
        assert error(got, want) < CODEC_ERROR[codec]


class Tap:
    """Sends every expert's rows to a buffer, in units of a token's own loss."""

    def __init__(self, buffers: list[RowBuffer], num_tokens: int) -> None:
        self.buffers, self.num_tokens = buffers, num_tokens

    def forward_rows(self, expert: int, x_ND: Tensor, gate_N: Tensor) -> None: ...

    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        self.buffers[expert].add(x_ND, dy_ND * self.num_tokens)


def test_sketches_of_several_batches_give_the_gradient_of_the_joint_mean_loss() -> None:
    """The units: C composers' own mean losses, rows times their tokens, summed, over all tokens."""
    hidden, num_experts, top_k = 24, 5, 2
    experts = [DenseExpert(*weights(random.randint(3, 20), hidden)) for _ in range(num_experts)]
    batches = []
    for _ in range(3):
        x = torch.randn(random.randint(30, 90), hidden, dtype=torch.float64)
        gates, index = torch.randn(len(x), num_experts, dtype=torch.float64).softmax(-1).topk(top_k)
        batches.append((x, index, gates, torch.randn_like(x)))

    def loss_sum(x: Tensor, index: Tensor, gates: Tensor, target: Tensor, y: Tensor) -> Tensor:
        return (y - target).square().sum()

    total = sum(len(batch[0]) for batch in batches)
    sums = [[torch.zeros_like(expert.gate_up), torch.zeros_like(expert.down)] for expert in experts]
    for batch in batches:
        buffers = [RowBuffer(hidden) for _ in experts]
        x = batch[0].clone().requires_grad_()
        y = apply_experts(x, batch[1], batch[2], experts, tap=Tap(buffers, len(x)))
        (loss_sum(*batch, y) / len(x)).backward()
        for expert, buffer, held in zip(experts, buffers, sums, strict=True):
            for into, gradient in zip(held, expert_gradient(*expert.dense(), buffer.take(None)), strict=True):
                into += gradient / total

    joint = [DenseExpert(e.gate_up.clone().requires_grad_(), e.down.clone().requires_grad_()) for e in experts]
    x, index, gates, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    (loss_sum(x, index, gates, target, apply_experts(x, index, gates, joint)) / total).backward()
    for expert, held in zip(joint, sums, strict=True):
        for weight, got in zip((expert.gate_up, expert.down), held, strict=True):
            assert weight.grad is not None
            assert error(got, weight.grad) < CODEC_ERROR["int8"]


def test_bytes_round_trip() -> None:
    for codec in CODECS:
        for num in (None, 7):
            sketch = sketched(*rows(30, 12), codec, num)
            data = sketch.to_bytes()
            assert len(data) == sketch.nbytes == 24 + sketch.num_rows * row_bytes(12, codec, weighted=num is not None)
            back = RowSketch.from_bytes(data, hidden=12, max_rows=30)
            assert back.to_bytes() == data
            assert (back.pairs, back.effective, back.codec) == (30, sketch.effective, codec)
            assert torch.equal(back.x.dense(), sketch.x.dense())
            assert torch.equal(back.dy.dense(), sketch.dy.dense())


def test_kappa_follows_fidelity() -> None:
    assert kappa_for(-3.0) == kappa_for(0.75) == 20.0
    assert kappa_for(0.92) == kappa_for(1.0) == kappa_for(float("nan")) == 0.0
    assert kappa_for(0.835) == pytest.approx(10.0)


def test_bytes_of_the_large_model_in_the_design() -> None:
    per_token = bytes_per_token(2048, "int8", top_k=8, num_moe_layers=48, owned_share=1 / 8)
    assert per_token == pytest.approx(1.4e6, rel=0.02)
