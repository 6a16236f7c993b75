"""`apply_experts` against a naive reference, finite differences, and transformers' own eager experts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from shoal.kernels import grouped
from shoal.kernels.experts import DenseExpert
from shoal.kernels.lowbit import LowbitStandIn
from shoal.kernels.routed import apply_experts, drop_over_capacity
from shoal.kernels.ternary_standin import TernaryStandIn
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


class Frozen:
    """A stand-in: hands out a fresh copy each time, like one that dequantises."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down, self.calls = gate_up, down, 0
        self.width = down.shape[1]

    def dense(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.gate_up.clone(), self.down.clone()


def weights(width: int, hidden: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2 * width, hidden, dtype=dtype) / hidden**0.5, torch.randn(
        hidden, width, dtype=dtype
    ) / width**0.5


def owned(width: int, hidden: int, dtype: torch.dtype = torch.float64) -> DenseExpert:
    return DenseExpert(*(torch.nn.Parameter(w) for w in weights(width, hidden, dtype)))


def naive(x: Tensor, index: Tensor, gates: Tensor, experts: Sequence[DenseExpert | Frozen]) -> Tensor:
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for k in range(index.shape[1]):
            if index[t, k] < len(experts):
                expert = experts[int(index[t, k])]
                hg, hu = linear(x[t], expert.gate_up).chunk(2)
                y = y + gates[t, k] * linear(silu(hg) * hu, expert.down)
        rows.append(y)
    return torch.stack(rows)


def routing(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    gates, index = torch.randn(num_tokens, num_experts, dtype=dtype).softmax(-1).topk(top_k)
    return index, gates.requires_grad_()


def case() -> tuple[Tensor, Tensor, Tensor, list[DenseExpert | Frozen]]:
    """Random shapes: some experts frozen, some never hit, widths all different, some pairs dropped."""
    hidden, num_experts = random.randint(1, 9), random.randint(2, 8)
    top_k, num_tokens = random.randint(1, num_experts), random.randint(1, 12)
    experts: list[DenseExpert | Frozen] = [
        owned(random.randint(1, 3), hidden) if random.random() < 0.5 else Frozen(*weights(random.randint(1, 3), hidden))
        for _ in range(num_experts)
    ]
    index, gates = routing(num_tokens, num_experts, top_k)
    index = index.masked_fill(index == random.randrange(num_experts), 0)  # one expert is empty, 0 may come twice
    index = index.masked_fill(torch.rand(index.shape) < 0.2, num_experts)
    return torch.randn(num_tokens, hidden, dtype=torch.float64, requires_grad=True), index, gates, experts


@pytest.mark.parametrize("together", [(1, 1), (20, 60), (1 << 16, 1 << 20)], ids=str)  # each alone, some, all
@pytest.mark.parametrize("_", range(8))
def test_outputs_and_gradients_equal_the_naive_sum(
    _: int, together: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grouped.TOGETHER, "cpu", together)
    x, index, gates, experts = case()
    leaves = [x, gates, *(w for e in experts if isinstance(e, DenseExpert) for w in e.dense())]
    grad = torch.randn_like(x)

    def run(y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not y.requires_grad:  # the naive sum of nothing but dropped pairs
            return y, tuple(torch.zeros_like(leaf) for leaf in leaves)
        return y, torch.autograd.grad(y, leaves, grad, materialize_grads=True)

    torch.testing.assert_close(run(apply_experts(x, index, gates, experts)), run(naive(x, index, gates, experts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LowbitStandIn, TernaryStandIn, Frozen])
def test_one_launch_for_all_products_changes_nothing(
    kind: type[LowbitStandIn | TernaryStandIn | Frozen], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, width, num_experts, top_k = (8 * random.randint(1, 6), 8 * random.randint(1, 6), random.randint(2, 9), 2)
    experts = [
        owned(width, hidden, torch.float32)
        if random.random() < 0.5
        else (kind if kind is Frozen else kind.of)(*weights(width, hidden, torch.float32))
        for _ in range(num_experts)
    ]
    index, gates = routing(random.randint(1, 60), num_experts, top_k, torch.float32)
    x = torch.randn(len(index), hidden, requires_grad=True)
    leaves = [x, gates, *(w for e in experts if isinstance(e, DenseExpert) for w in e.trained)]
    grad = torch.randn_like(x)
    launches = 0

    def grouped_mm(*args: Tensor, **named: Tensor) -> Tensor:
        nonlocal launches
        launches += 1
        return counted(*args, **named)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            y = apply_experts(x, index, gates, experts)
        return y, torch.autograd.grad(y, leaves, grad)

    expected = run()
    counted = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    monkeypatch.setattr(grouped, "_has_kernel", lambda device, dtype: True)
    found = run()
    assert launches in (4, 8)  # of one kind of experts, or two
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # of a CPU's product in bfloat16, which sums in some order
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", [LowbitStandIn, TernaryStandIn])
def test_a_gpu_computes_what_a_cpu_does(kind: type[LowbitStandIn | TernaryStandIn]) -> None:
    index, gates = routing(256, 8, 2, torch.float32)
    x, grad = torch.randn(256, 64), torch.randn(256, 64)
    dense = [weights(32, 64, torch.float32) for _ in range(8)]

    def run(device: torch.device) -> list[Tensor]:
        experts = [
            DenseExpert(*(torch.nn.Parameter(matrix.to(device)) for matrix in pair))
            if slot % 4 == 0
            else kind.of(*pair).to(device)
            for slot, pair in enumerate(dense)
        ]
        leaves = [x.to(device).requires_grad_(), gates.detach().to(device).requires_grad_()]
        y = apply_experts(leaves[0], index.to(device), leaves[1], experts, dtype=grouped.fast_dtype(device))
        leaves += [weight for expert in experts if isinstance(expert, DenseExpert) for weight in expert.trained]
        return [found.cpu() for found in (y, *torch.autograd.grad(y, leaves, grad.to(device)))]

    for found, expected in zip(run(torch.device("cuda")), run(torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gradcheck(act: str) -> None:
    x, index, gates, experts = case()
    experts[0] = owned(3, x.shape[1])
    index[0, 0] = 0
    trained = [w for e in experts if isinstance(e, DenseExpert) for w in e.dense()]

    def f(x: Tensor, gates: Tensor, *_trained: Tensor) -> Tensor:
        return apply_experts(x, index, gates, experts, act=act)

    assert torch.autograd.gradcheck(f, (x, gates, *trained))


@pytest.mark.parametrize("_", range(3))
def test_parity_with_transformers(_: int) -> None:
    hidden, width = random.randint(8, 80), random.randint(8, 80)
    num_experts = random.randint(2, 16)
    top_k, num_tokens = random.randint(1, num_experts), random.randint(1, 300)
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width, num_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config)
    with torch.no_grad():
        theirs.gate_up_proj.normal_(0, hidden**-0.5)
        theirs.down_proj.normal_(0, width**-0.5)
    ours = [
        DenseExpert(torch.nn.Parameter(gate_up.clone()), torch.nn.Parameter(down.clone()))
        for gate_up, down in zip(theirs.gate_up_proj.detach(), theirs.down_proj.detach(), strict=True)
    ]
    index, gates = routing(num_tokens, num_experts, top_k, torch.float32)
    x = torch.randn(num_tokens, hidden, requires_grad=True)
    index = drop_over_capacity(index, gates, num_experts, max(1, num_tokens * top_k // num_experts))
    grad = torch.randn(num_tokens, hidden) / num_tokens**0.5

    expected = theirs(x, index, gates)
    expected_grads = torch.autograd.grad(expected, [x, gates, theirs.gate_up_proj, theirs.down_proj], grad)
    y = apply_experts(x, index, gates, ours)
    grads = torch.autograd.grad(y, [x, gates, *(e.gate_up for e in ours), *(e.down for e in ours)], grad)
    stacked = (*grads[:2], torch.stack(grads[2 : 2 + num_experts]), torch.stack(grads[2 + num_experts :]))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stacked, expected_grads, atol=1e-5, rtol=1e-5)


def test_frozen_experts_get_no_gradient_and_are_asked_twice() -> None:
    frozen, half = Frozen(*weights(3, 4)), owned(3, 4)
    half.down.requires_grad_(False)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    index, gates = routing(5, 2, 2)
    torch.autograd.backward(apply_experts(x, index, gates, [frozen, half]).sum())
    assert frozen.calls == 2  # once per pass: nothing dequantised is kept
    assert frozen.gate_up.grad is None
    assert half.down.grad is None
    assert half.gate_up.grad is not None


def test_an_owned_expert_without_rows_has_a_zero_gradient() -> None:
    experts = [owned(3, 4), owned(3, 4)]
    x, gates = torch.randn(5, 4, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    torch.autograd.backward(apply_experts(x, torch.zeros(5, 1, dtype=torch.int64), gates, experts).sum())
    assert experts[1].gate_up.grad is not None
    assert not experts[1].gate_up.grad.any()


@pytest.mark.parametrize(("num_tokens", "index"), [(0, 0), (4, 3)])
def test_nothing_routed(num_tokens: int, index: int) -> None:
    experts = [owned(2, 4, torch.float32) for _ in range(3)]
    x = torch.randn(num_tokens, 4, requires_grad=True)
    gates = torch.rand(num_tokens, 2, requires_grad=True)
    y = apply_experts(x, torch.full((num_tokens, 2), index), gates, experts)
    torch.autograd.backward(y.sum())
    assert y.shape == x.shape
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()
    assert gates.grad is not None
    assert not gates.grad.any()


def test_bfloat16_stays_near_float64() -> None:
    experts = [owned(32, 32) for _ in range(4)]
    index, gates = routing(64, 4, 2)
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    leaves = [x, gates, experts[0].gate_up, experts[0].down]
    grad = torch.randn_like(x)
    expected = apply_experts(x, index, gates, experts)
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    half = x.detach().bfloat16().requires_grad_()
    y = apply_experts(half, index, gates, experts)  # float64 weights and gates are cast, their gradients cast back
    leaves[0] = half
    grads = torch.autograd.grad(y, leaves, grad.bfloat16())
    assert y.dtype == torch.bfloat16
    for got, want, leaf in zip((y, *grads), (expected, *expected_grads), (half, *leaves), strict=True):
        assert got.dtype == leaf.dtype
        assert (got.double() - want).norm() < 0.03 * want.norm()


def test_autocast_computes_in_its_dtype_and_returns_that_of_x() -> None:
    experts = [owned(8, 8, torch.float32) for _ in range(2)]
    index, gates = routing(16, 2, 1, torch.float32)
    x = torch.randn(16, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply_experts(x, index, gates, experts)
    torch.autograd.backward(y.sum())
    assert y.dtype == torch.float32
    full = apply_experts(x, index, gates, experts)
    assert not torch.equal(y, full)
    torch.testing.assert_close(y, full, atol=0.1, rtol=0.1)


class Recorder:
    def __init__(self) -> None:
        self.forward: dict[int, tuple[Tensor, Tensor]] = {}
        self.backward: dict[int, tuple[Tensor, Tensor]] = {}

    def forward_rows(self, expert: int, x_ND: Tensor, gate_N: Tensor) -> None:
        self.forward[expert] = x_ND, gate_N

    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        self.backward[expert] = x_ND, dy_ND


@pytest.mark.parametrize("_", range(4))
def test_tapped_rows_hold_the_whole_training_signal(_: int) -> None:
    """(x, dy) alone give every expert's weight gradient, owned or not: that is what a row sketch carries."""
    x, index, gates, experts = case()
    index[0] = 0
    tap, grad = Recorder(), torch.randn_like(x)
    torch.autograd.backward(apply_experts(x, index, gates, experts, tap=tap), grad)

    assert set(tap.forward) == set(tap.backward) == {e for e in set(index.flatten().tolist()) if e < len(experts)}
    for e in tap.forward:
        copy = DenseExpert(*(w.detach().clone().requires_grad_() for w in (experts[e].gate_up, experts[e].down)))
        everything: list[DenseExpert | Frozen] = [*experts]
        everything[e] = copy
        torch.autograd.backward(naive(x.detach(), index, gates.detach(), everything), grad)
        rows_x, rows_dy = tap.backward[e]
        hg, hu = linear(rows_x, copy.gate_up).chunk(2, dim=-1)
        y = linear(silu(hg) * hu, copy.down)
        torch.testing.assert_close(
            torch.autograd.grad(y, [copy.gate_up, copy.down], rows_dy), (copy.gate_up.grad, copy.down.grad)
        )
        assert torch.equal(tap.forward[e][0], rows_x)
        assert not any(t.requires_grad for t in (*tap.forward[e], *tap.backward[e]))
        tokens, k = torch.where(index == e)
        torch.testing.assert_close(tap.forward[e][1], gates[tokens, k].detach())


def test_without_gradient_only_forward_rows_are_tapped() -> None:
    x, index, gates, experts = case()
    index[0] = 0
    tap = Recorder()
    with torch.no_grad():
        apply_experts(x, index, gates, experts, tap=tap)
    assert tap.forward
    assert not tap.backward


@pytest.mark.parametrize("_", range(5))
def test_capacity_keeps_the_highest_gates(_: int) -> None:
    num_experts, capacity = random.randint(2, 8), random.randint(1, 6)
    index, gates = routing(random.randint(0, 30), num_experts, random.randint(1, num_experts), torch.float32)
    kept = drop_over_capacity(index, gates, num_experts, capacity)
    assert kept.shape == index.shape
    for e in range(num_experts):
        best = gates[index == e].sort(descending=True).values[:capacity]
        assert torch.equal(gates[kept == e].sort(descending=True).values, best)
    assert ((kept == index) | (kept == num_experts)).all()


def test_capacity_breaks_ties_by_position() -> None:
    kept = drop_over_capacity(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 1, 2)
    assert kept.flatten().tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="capacity"):
        drop_over_capacity(kept, torch.ones(4, 1), 1, 0)


@pytest.mark.parametrize(
    ("x", "index", "act", "message"),
    [
        ((3, 4), (2, 1), "silu", "are not"),
        ((4,), (4, 1), "silu", "are not"),
        ((3, 4), (3, 1), "swish2", "activation"),
    ],
)
def test_wrong_calls_say_why(x: tuple[int, ...], index: tuple[int, ...], act: str, message: str) -> None:
    experts = [owned(2, 4)]
    with pytest.raises(ValueError, match=message):
        apply_experts(torch.zeros(x), torch.zeros(index, dtype=torch.int64), torch.zeros(index), experts, act=act)


def test_an_index_above_dropped_is_refused() -> None:
    with pytest.raises(ValueError, match="above 1"):
        apply_experts(torch.zeros(2, 4), torch.tensor([[0], [2]]), torch.ones(2, 1), [owned(2, 4, torch.float32)])


def test_gelu_is_used_when_named() -> None:
    expert, x = owned(3, 4), torch.randn(5, 4, dtype=torch.float64)
    y = apply_experts(
        x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1, dtype=torch.float64), [expert], act="gelu"
    )
    hg, hu = linear(x, expert.gate_up).chunk(2, dim=-1)
    torch.testing.assert_close(y, linear(gelu(hg) * hu, expert.down))
