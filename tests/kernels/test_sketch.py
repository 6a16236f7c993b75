"""Row sketches: what they keep of an expert's gradient, for any budget, and what the correction is worth."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import pytest
import torch
from shoal.kernels.experts import DenseExpert, run_expert
from shoal.kernels.routed import apply_experts
from shoal.kernels.rows import CODECS, LARGEST, Float16Rows, RowCodec
from shoal.kernels.sketch import (
    FOLLOWS_FIDELITY,
    KAPPA_ROUGH,
    RowBuffer,
    RowSketch,
    add_rows,
    bytes_per_token,
    kappa_for,
    row_bytes,
)
from shoal.kernels.sketch_gradient import expert_gradient
from torch import Tensor

# How far a decoded value may be from what was given, in units of its row's largest: half a step of 127 or of 7, half a
# unit in the last of 11 places; and 2% of that, as scales are rounded too.
CODEC_STEP = {"int8": 1.02 / 254, "float16": 1.02 / 2048, "int4": 1.02 / 14}
# Relative error of a gradient after int8, in norm, at most: 1.1% come of it at rows of 64 normal values, 1.5% at 2048.
INT8_ERROR = 0.02


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
    hidden, width = random.choice([random.randint(8, 64), 1024]), random.randint(4, 64)
    gate_up, down = weights(width, hidden)
    x, dy = rows(random.randint(20, 300), hidden)
    buffer = RowBuffer(hidden, codec)
    at_once = random.randint(1, 100)
    for part in zip(x.split(at_once), dy.split(at_once), strict=True):
        buffer.add(*part)
    sketch = buffer.take(None)
    assert (sketch.num_rows, sketch.pairs, sketch.effective, sketch.weights_N) == (len(x), len(x), 1.0, None)
    assert len(buffer) == 0
    kept_x, kept_dy = sketch.x.dense().double(), sketch.dy.dense().double()
    for kept, given in ((kept_x, x), (kept_dy, dy)):
        assert ((kept - given).abs() <= CODEC_STEP[codec] * given.abs().amax(1, keepdim=True)).all()
    want = autograd(gate_up, down, kept_x, kept_dy, act)
    for got, wanted in zip(expert_gradient(gate_up, down, sketch, act), want, strict=True):
        assert error(got, wanted) < 1e-12


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
            assert error(got, weight.grad) < INT8_ERROR


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


def test_golden_bytes() -> None:
    """A change of format is a decision."""
    x, dy = torch.tensor([[127.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.5, 63.5], [-63.5, 1.0]])
    whole = sketched(x, dy)
    header = "01 00 00 00 02000000 0200000000000000 000000000000f03f"
    assert whole.to_bytes() == bytes.fromhex(header + "7fff 0000 803f 0000" + "017f 8102 003f 003f")
    half = RowSketch(Float16Rows(x[:1].half()), Float16Rows(dy[:1].half()), torch.tensor([2.0]), 0.5, 2, "float16")
    header = "01 01 01 00 01000000 0200000000000000 000000000000e03f"
    assert half.to_bytes() == bytes.fromhex(header + "f057 00bc" + "0038 f053" + "00000040")
    quarter = sketched(x[:1], dy[:1], "int4")
    header = "01 02 00 00 01000000 0100000000000000 000000000000f03f"
    zeros = "88" * 31
    assert quarter.to_bytes() == bytes.fromhex(header + f"f8{zeros} 9241" + f"8f{zeros} 1241")
    nothing = RowBuffer(2).take(None)
    assert nothing.to_bytes() == bytes.fromhex("01 00 00 00 00000000 0000000000000000 000000000000f03f")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num", [None, 5])
def test_damaged_bytes_are_refused(codec: RowCodec, num: int | None) -> None:
    data = sketched(*rows(9, 6), codec, num).to_bytes()

    def read(data: bytes, hidden: int = 6, max_rows: int = 9) -> RowSketch:
        return RowSketch.from_bytes(data, hidden=hidden, max_rows=max_rows)

    read(data)
    for cut in range(len(data)):
        with pytest.raises(ValueError, match="bytes"):
            read(data[:cut])
    for wrong in (data + b"\0", data * 2, random.randbytes(len(data))):
        with pytest.raises(ValueError, match=r"bytes|sketch"):
            read(wrong)
    with pytest.raises(ValueError, match="bytes"):
        read(data, hidden=70)
    with pytest.raises(ValueError, match="more than"):
        read(data, max_rows=(num or 9) - 1)
    for _ in range(500):  # any damage is refused, or is a sketch that can be used
        damaged = bytearray(data)
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(len(data))] = random.randrange(256)
        try:
            sketch = read(bytes(damaged))
        except ValueError:
            continue
        assert bool(sketch.x.dense().isfinite().all() and sketch.dy.dense().isfinite().all())
        assert 0 < sketch.effective <= 1
        assert sketch.weights_N is None or float(sketch.weights_N.double().sum()) <= 64 * sketch.pairs


def forged(
    *, rows: int = 2, pairs: int = 8, effective: float = 0.25, weights: tuple[float, ...] = (4.0, 4.0)
) -> RowSketch:
    """A sampled sketch whose numbers are as given."""
    good = sketched(torch.ones(2, 3), torch.ones(2, 3)).to_bytes()
    tail = struct.pack(f"<{len(weights)}f", *weights)
    data = struct.pack("<BBBxIQd", 1, 0, bool(weights), rows, pairs, effective) + (good[24:] if rows else b"") + tail
    return RowSketch.from_bytes(data, hidden=3, max_rows=9)


@pytest.mark.parametrize(
    "numbers",
    [
        {"effective": math.nan},
        {"effective": 1.5},
        {"effective": -0.1},
        {"effective": 0.0},
        {"weights": (4.0, math.inf)},
        {"weights": (math.nan, 4.0)},
        {"weights": (4.0, 0.5)},
        {"weights": (-4.0, 4.0)},
        {"weights": (4.0, 1e9)},
        {"pairs": 1},
        {"weights": (), "pairs": 8},
        {"weights": (), "pairs": 2},  # two plain rows are worth all of two
        {"rows": 0, "weights": ()},
        {"rows": 0, "weights": (), "effective": 1.0},
        {"rows": 0, "weights": (), "pairs": 0, "effective": 0.0},
    ],
)
def test_counts_and_weights_that_no_sampling_gives_are_refused(numbers: dict[str, Any]) -> None:
    assert forged().num_rows == 2
    assert forged(rows=0, weights=(), effective=0.0).pairs == 8
    with pytest.raises(ValueError, match=r"sketch|weight|rows"):
        forged(**numbers)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_that_are_not_finite_or_too_large_are_left_out_and_counted(codec: RowCodec) -> None:
    gate_up, down = weights(4, 6, torch.float32)
    x, dy = rows(12, 6)
    bad_x, bad_dy = x.clone(), dy.clone()
    bad_x[3, 2], bad_x[4, 0], bad_dy[4, 1], bad_dy[7, 5], bad_dy[9, 0] = math.nan, math.inf, math.nan, -math.inf, 1e300
    bad_x[10, 0] = 1e18  # finite, but no codec carries it
    buffer = RowBuffer(6, codec)
    buffer.add(bad_x, bad_dy)
    good = torch.tensor([0, 1, 2, 5, 6, 8, 11])
    sketch = buffer.take(None)
    assert (buffer.refused, sketch.pairs, sketch.num_rows) == (5, 7, 7)
    for got, want in zip(
        expert_gradient(gate_up, down, sketch),
        expert_gradient(gate_up, down, sketched(x[good], dy[good], codec)),
        strict=True,
    ):
        assert torch.equal(got, want)
    buffer.add(torch.full((5, 6), math.nan), torch.ones(5, 6))
    assert len(buffer) == 0


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_many_experts_together_are_the_same_as_one_by_one(codec: RowCodec) -> None:
    counts = [random.choice([0, 1, 7, 40]) for _ in range(6)]
    x, dy = rows(sum(counts), 16)
    spoiled = random.sample(range(len(x)), len(x) // 5)
    for row in spoiled:
        (x if random.random() < 0.5 else dy)[row, random.randrange(16)] = random.choice([math.nan, math.inf, 1e30])
    together, apart = (
        [RowBuffer(16, codec, max_rows=20, generator=torch.Generator().manual_seed(i)) for i in range(6)]
        for _ in range(2)
    )
    add_rows(together, counts, x, dy)
    for buffer, x_ND, dy_ND in zip(apart, x.split(counts), dy.split(counts), strict=True):
        buffer.add(x_ND, dy_ND)
    assert sum(buffer.refused for buffer in together) == len(spoiled)
    for ours, theirs in zip(together, apart, strict=True):
        assert ours.refused == theirs.refused
        assert ours.take(None).to_bytes() == theirs.take(None).to_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_rows_that_fit_are_kept_sampled_and_refused_only_as_gradients(codec: RowCodec) -> None:
    largest = 0.9 * LARGEST[codec]
    gate_up, down = weights(4, 6, torch.float32)
    buffer = RowBuffer(6, codec, max_rows=10)
    for _ in range(3):
        buffer.add(torch.full((7, 6), largest), torch.full((7, 6), -largest))
    assert buffer.refused == 0
    sketch = buffer.take(4)
    back = RowSketch.from_bytes(sketch.to_bytes(), hidden=6, max_rows=4)
    assert error(back.x.dense(), torch.full((4, 6), largest)) < 0.01
    if codec != "float16":  # act(1e15) * 1e15 * 1e15 is more than a float32
        with pytest.raises(ValueError, match="not finite"):
            expert_gradient(gate_up.abs(), down, back)


def test_empty_and_single_rows() -> None:
    gate_up, down = weights(4, 6)
    for empty in (sketched(*rows(0, 6)), RowBuffer(6, "float16").take(3), RowBuffer(6).take(None)):
        assert (empty.num_rows, empty.pairs, empty.effective) == (0, 0, 1.0)
        back = RowSketch.from_bytes(empty.to_bytes(), hidden=6, max_rows=0)
        for gradient in expert_gradient(gate_up, down, back, kappa=2.0, standin=weights(3, 6)):
            assert float(gradient.abs().max()) == 0.0
    x, dy = rows(1, 6)
    for num in (None, 1, 5):
        single = sketched(x, dy, "float16", num)
        assert (single.num_rows, single.pairs, single.effective, single.weights_N) == (1, 1, 1.0, None)
        assert error(expert_gradient(gate_up, down, single)[1], autograd(gate_up, down, x, dy)[1]) < 2e-3
    zeros = sketched(torch.zeros(8, 6), torch.zeros(8, 6), num=2)
    assert (zeros.num_rows, zeros.effective) == (2, 0.25)
    assert float(expert_gradient(gate_up, down, zeros)[0].abs().max()) == 0.0


def test_rows_for_which_there_is_no_budget_are_worth_nothing() -> None:
    buffer = RowBuffer(6)
    buffer.add(*rows(5, 6))
    sketch = buffer.take(0)
    assert (sketch.num_rows, sketch.pairs, sketch.effective, len(buffer)) == (0, 5, 0.0, 0)
    assert RowSketch.from_bytes(sketch.to_bytes(), hidden=6, max_rows=0).pairs == 5


def test_a_buffer_stays_within_its_bound_and_forgets_what_was_taken() -> None:
    buffer = RowBuffer(6, max_rows=16)
    for _ in range(2):
        pairs = 0
        for _ in range(20):
            x, dy = rows(random.randint(0, 40), 6)
            buffer.add(x, dy)
            pairs += len(x)
            assert len(buffer) == min(16, pairs)
        sketch = buffer.take(None)
        assert (sketch.num_rows, sketch.pairs) == (min(16, pairs), pairs)
        assert 0 < sketch.effective < 1
        assert len(buffer) == 0


def test_sampled_rows_are_rows_that_came() -> None:
    """x and dy of a row stay together while rows replace one another."""
    hidden = 5
    buffer = RowBuffer(hidden, "float16", max_rows=16)
    for start in range(0, 200, 20):
        number = torch.arange(start + 1, start + 21).float()[:, None]
        buffer.add(number.expand(20, hidden), number.flip(1).expand(20, hidden) * 2)
    sketch = buffer.take(9)
    x, dy = sketch.x.dense(), sketch.dy.dense()
    assert torch.equal(dy, 2 * x)
    assert len(set(x[:, 0].tolist())) == 9


def test_wrong_shapes_and_settings_are_refused() -> None:
    gate_up, down = weights(4, 6)
    sketch = sketched(*rows(5, 6))
    buffer = RowBuffer(6)
    for x, dy in (((3, 5), (3, 5)), ((3, 6), (2, 6)), ((6,), (6,))):
        with pytest.raises(ValueError, match="rows of 6"):
            buffer.add(torch.zeros(x), torch.zeros(dy))
    for call in (
        lambda: RowBuffer(0),
        lambda: RowBuffer(6, max_rows=0),
        lambda: RowBuffer(6, "int2"),  # type: ignore[arg-type]
        lambda: buffer.take(-1),
        lambda: expert_gradient(gate_up, down, sketched(*rows(5, 7))),
        lambda: expert_gradient(gate_up[:-1], down, sketch),
        lambda: expert_gradient(gate_up, down, sketch, "relu"),
        lambda: expert_gradient(gate_up, down, sketch, kappa=1.0),
        lambda: expert_gradient(gate_up, down, sketch, kappa=-2.0, standin=(gate_up, down)),
        lambda: expert_gradient(gate_up, down, sketch, kappa=FOLLOWS_FIDELITY),
        lambda: expert_gradient(gate_up, down, sketch, kappa=math.nan, standin=(gate_up, down)),
        lambda: expert_gradient(gate_up, down, sketch, curvature="half"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"."):
            call()
    assert len(buffer) == 0


def test_kappa_follows_fidelity() -> None:
    assert kappa_for(-3.0) == kappa_for(0.75) == KAPPA_ROUGH
    assert kappa_for(0.92) == kappa_for(1.0) == kappa_for(float("nan")) == 0.0
    assert kappa_for(0.835) == pytest.approx(KAPPA_ROUGH / 2)


def test_bytes_of_the_large_model_in_the_design() -> None:
    per_token = bytes_per_token(2048, "int8", top_k=8, num_moe_layers=48, owned_share=1 / 8)
    assert per_token == pytest.approx(1.4e6, rel=0.02)
