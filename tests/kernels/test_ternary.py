"""Ternary weights against a naive form, exact packing, straight-through gradients against autograd, exact masters."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.kernels.codecs import SMALLEST_SCALE
from shoal.kernels.experts import DenseExpert, run_expert
from shoal.kernels.routed import apply_experts
from shoal.kernels.ternary import (
    Ternary,
    TernaryExpert,
    masters_from,
    pack_trits,
    packed_nbytes,
    straight_through,
    ternarise,
    ternary_nbytes,
    unpack_trits,
)
from torch import Tensor


def matrix(rows: int | None = None, columns: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different norms, some of them zero, some entries zero."""
    shape = rows or random.randint(1, 40), columns or random.randint(1, 70)
    w = torch.randn(shape, dtype=dtype) * torch.randn(shape[0], 1, dtype=dtype).exp()
    w = w * (torch.rand(shape) > random.choice([0.0, 0.3, 0.95]))
    return w * (torch.rand(shape[0], 1) > 0.1)


def naive(w: Tensor) -> Tensor:
    """clip(round(w / s), -1, 1) s, s = mean |w| as bfloat16, in float64."""
    scale = w.double().abs().mean(1, keepdim=True).to(torch.bfloat16).double()
    codes = torch.where(scale == 0, 0.0, (w.double() / scale).round().clamp(-1, 1))
    return codes * scale


def random_codes(size: int) -> Tensor:
    return (torch.randint(0, 3, (size,)) - 1).to(torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_absmean(dtype: torch.dtype) -> None:
    for _ in range(10):
        w = matrix(dtype=dtype)
        ternary = ternarise(w)
        assert ternary.codes.dtype == torch.int8
        assert ternary.scales.dtype == torch.bfloat16
        assert torch.equal(ternary.dense(torch.float64), naive(w))
        assert torch.equal(straight_through(w), naive(w).to(dtype))


def test_halves_and_tiny_weights_round_to_zero() -> None:
    w = torch.tensor([[0.5, 1.5], [-0.5, -1.5], [SMALLEST_SCALE / 3, -SMALLEST_SCALE / 3], [0.0, -0.0], [-2.0, 2.0]])
    ternary = ternarise(w)
    assert ternary.codes.tolist() == [[0, 1], [0, -1], [0, 0], [0, 0], [-1, 1]]
    assert ternary.scales.tolist() == [1.0, 1.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_do_not_hide(spoil: float) -> None:
    w = torch.randn(4, 5)
    w[2, 3] = spoil
    effective = straight_through(w)
    assert bool(effective[2].isnan().all())
    assert bool(effective[[0, 1, 3]].isfinite().all())
    with pytest.raises(ValueError, match="scale"):
        masters_from(ternarise(w))


@settings(max_examples=60)
@given(size=st.integers(0, 200), key=st.integers(0, 1 << 30))
def test_packing_is_exact(size: int, key: int) -> None:
    torch.manual_seed(key)
    codes = random_codes(size)
    packed = pack_trits(codes)
    assert len(packed) == packed_nbytes(size) == (size + 4) // 5
    assert torch.equal(unpack_trits(packed, size), codes)


def test_every_byte_is_one_quintuple() -> None:
    every = torch.arange(243, dtype=torch.uint8)
    codes = unpack_trits(every, 243 * 5)
    assert len(set(map(tuple, codes.view(-1, 5).tolist()))) == 243
    assert torch.equal(pack_trits(codes), every)
    for byte, quintuple in enumerate(codes.view(-1, 5).tolist()):
        assert byte == sum(3**i * (code % 3) for i, code in enumerate(quintuple))


def test_what_is_not_packed_trits_is_refused() -> None:
    for byte in range(243, 256):
        with pytest.raises(ValueError, match="above 242"):
            unpack_trits(torch.tensor([0, byte, 0], dtype=torch.uint8), 15)
    packed = pack_trits(random_codes(13))
    for size in (0, 10, 16, 100):
        with pytest.raises(ValueError, match="are"):
            unpack_trits(packed, size)
    with pytest.raises(ValueError, match="uint8"):
        unpack_trits(packed.to(torch.int16), 13)
    packed[-1] = 27  # the fourth trit of a byte that carries three
    with pytest.raises(ValueError, match="padding"):
        unpack_trits(packed, 13)
    for codes in (torch.tensor([2], dtype=torch.int8), torch.tensor([-2], dtype=torch.int8), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="can be packed"):
            pack_trits(codes)


def test_a_matrix_through_bytes_is_the_same() -> None:
    for _ in range(10):
        ternary = ternarise(matrix())
        rows, columns = ternary.codes.shape
        data = ternary.to_bytes()
        assert len(data) == ternary_nbytes(rows, columns)
        again = Ternary.from_bytes(data, rows, columns)
        assert torch.equal(again.codes, ternary.codes)
        assert torch.equal(again.scales, ternary.scales)


def test_bad_bytes_of_a_matrix_are_refused() -> None:
    ternary = ternarise(torch.randn(3, 7))
    data = ternary.to_bytes()
    cut = packed_nbytes(21)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match="bytes"):
            Ternary.from_bytes(wrong, 3, 7)
    for scale in (torch.nan, torch.inf, -1.0, -0.0, 1e-20, 1e30):
        bad = Ternary(ternary.codes, torch.tensor([1.0, scale, 1.0], dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="scale"):
            Ternary.from_bytes(bad.to_bytes(), 3, 7)
    with pytest.raises(ValueError, match="scale is zero"):
        Ternary.from_bytes(data[:cut] + bytes(6), 3, 7)
    with pytest.raises(ValueError, match="scale is zero"):
        Ternary.from_bytes(bytes(cut) + data[cut:], 3, 7)


@settings(max_examples=60)
@given(rows=st.integers(1, 12), columns=st.integers(1, 3000), key=st.integers(0, 1 << 30))
def test_masters_have_the_same_form_to_the_bit(rows: int, columns: int, key: int) -> None:
    """Whatever the share of zeros in a row, and again from the masters of those masters."""
    torch.manual_seed(key)
    w = (
        torch.randn(rows, columns)
        * (5 * torch.randn(rows, 1)).exp()
        * (torch.rand(rows, columns) < torch.rand(rows, 1))
    )
    ternary = ternarise(w)
    masters = masters_from(ternary)
    again = ternarise(masters)
    assert torch.equal(again.codes, ternary.codes)
    assert torch.equal(again.scales, ternary.scales)
    assert torch.equal(masters_from(again), masters)
    for flipped in (ternarise(masters.flip(1)), ternarise(-masters)):  # neither order nor sign may matter
        assert torch.equal(flipped.scales, ternary.scales)


def test_masters_of_forged_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        masters_from(Ternary(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, dtype=torch.bfloat16)))


def experts(count: int, hidden: int, dtype: torch.dtype) -> list[TernaryExpert]:
    made = []
    for _ in range(count):
        width = random.randint(1, 7)
        weights = torch.randn(2 * width, hidden, dtype=dtype), torch.randn(hidden, width, dtype=dtype)
        made.append(TernaryExpert(*(torch.nn.Parameter(w) for w in weights)))
    return made


def detached(w: Tensor) -> Tensor:
    return w + (naive(w).to(w.dtype) - w).detach()


def test_gradients_pass_straight_to_the_masters() -> None:
    """`apply_experts` against autograd through w + (q(w) - w).detach(), with experts of many widths."""
    for _ in range(5):
        hidden, num_experts = random.randint(1, 9), random.randint(1, 5)
        owned = experts(num_experts, hidden, torch.float64)
        top_k, num_tokens = random.randint(1, num_experts), random.randint(1, 12)
        gates, index = torch.randn(num_tokens, num_experts, dtype=torch.float64).softmax(-1).topk(top_k)
        gates.requires_grad_()
        index = index.masked_fill(torch.rand(index.shape) < 0.2, num_experts)
        x = torch.randn(num_tokens, hidden, dtype=torch.float64, requires_grad=True)
        wanted = torch.zeros_like(x)
        for number, expert in enumerate(owned):
            gate = (gates * (index == number)).sum(1, keepdim=True)
            wanted = wanted + gate * run_expert(x, detached(expert.gate_up), detached(expert.down))
        got = apply_experts(x, index, gates, owned)
        torch.testing.assert_close(got, wanted)
        upstream = torch.randn_like(x)
        inputs = [x, gates, *(w for expert in owned for w in (expert.gate_up, expert.down))]
        torch.testing.assert_close(
            torch.autograd.grad((got * upstream).sum(), inputs), torch.autograd.grad((wanted * upstream).sum(), inputs)
        )


def test_gradients_pass_through_dense_too() -> None:
    (expert,) = experts(1, 6, torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    inputs = [expert.gate_up, expert.down]
    got = torch.autograd.grad(run_expert(x, *expert.dense()).square().sum(), inputs)
    wanted = run_expert(x, *(detached(w) for w in inputs)).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(wanted, inputs))


def test_training_the_masters_lowers_the_loss_of_the_ternary_expert() -> None:
    """A student of the teacher's own masters, moved: with straight-through gradients it fits better than it began."""
    teacher = DenseExpert(torch.randn(48, 24) / 24**0.5, torch.randn(24, 24) / 24**0.5)
    student = TernaryExpert(*(torch.nn.Parameter(w.clone()) for w in teacher.dense()))
    optimizer = torch.optim.Adam([student.gate_up, student.down], lr=2e-3)
    index, gates, held_out = torch.zeros(128, 1, dtype=torch.int64), torch.ones(128, 1), torch.randn(512, 24)

    def held_out_loss() -> float:
        with torch.no_grad():
            wanted = run_expert(held_out, *teacher.dense())
            return float((run_expert(held_out, *student.dense()) - wanted).square().mean())

    before = held_out_loss()
    for _ in range(150):
        x = torch.randn(128, 24)
        loss = (apply_experts(x, index, gates, [student]) - run_expert(x, *teacher.dense())).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert held_out_loss() < 0.85 * before
