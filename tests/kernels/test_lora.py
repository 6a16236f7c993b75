"""Low-rank experts against their definition in float64: W = base + scale B A, and its gradients."""

from __future__ import annotations

import pytest
import torch
from shoal.kernels.bnb import functional as bnb
from shoal.kernels.experts import FrozenExpert, OwnedExpert, run_expert
from shoal.kernels.lora import LoraExpert, Nf4Base, lora_bytes
from shoal.kernels.lowbit import BLOCK
from shoal.kernels.routed import apply_experts
from torch import Tensor

HIDDEN, WIDTH, RANK, ALPHA = 20, 12, 5, 7.5


def weights() -> tuple[Tensor, Tensor]:
    return torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH)


def expert() -> LoraExpert:
    """With factors as they are in the middle of training."""
    fresh = LoraExpert.of(*weights(), rank=RANK, alpha=ALPHA)
    return fresh.with_trained([0.3 * torch.randn_like(tensor) for tensor in fresh.trained])


def test_the_base_is_the_nearest_levels() -> None:
    gate_up, down = weights()
    flat = torch.cat([gate_up.flatten(), down.flatten()])
    dense = torch.cat([matrix.flatten() for matrix in Nf4Base.of(gate_up, down).dense()])
    levels = bnb.get_4bit_type("nf4", device="cpu", blocksize=BLOCK).double()
    for start in range(0, len(flat), BLOCK):
        block, got = flat[start : start + BLOCK].double(), dense[start : start + BLOCK].double()
        absmax = block.abs().max()
        nearest = levels[((block / absmax)[:, None] - levels).abs().argmin(1)] * absmax
        # The maxima are rounded to 8 bits, which moves a block's weights by up to so much, together.
        ratio = (got / nearest)[nearest != 0]
        assert (ratio - ratio[0]).abs().max() < 1e-5
        assert 0.9 < ratio[0] < 1.1


def test_a_new_one_is_its_base() -> None:
    gate_up, down = weights()
    fresh = LoraExpert.of(gate_up, down, rank=RANK, alpha=ALPHA)
    assert all(map(torch.equal, fresh.dense(), Nf4Base.of(gate_up, down).dense()))
    assert (fresh.dense()[0] - gate_up).norm() < 0.15 * gate_up.norm()


def test_dense_is_the_base_and_the_product() -> None:
    one = expert()
    base = one.base.dense()
    for got, start, a, b in zip(one.dense(), base, one.trained[::2], one.trained[1::2], strict=True):
        wanted = start.double() + ALPHA / RANK * b.double() @ a.double()
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def reference(one: LoraExpert, x_ND: Tensor, dy_ND: Tensor) -> tuple[Tensor, ...]:
    """Autograd's, in float64, through the definition."""
    factors = [tensor.detach().double().requires_grad_() for tensor in one.trained]
    gate_up, down = (matrix.double() for matrix in one.base.dense())
    gate_up = gate_up + one.scale * factors[1] @ factors[0]
    down = down + one.scale * factors[3] @ factors[2]
    return torch.autograd.grad((run_expert(x_ND.double(), gate_up, down) * dy_ND.double()).sum(), factors)


def test_gradients_through_routing_are_those_of_the_definition() -> None:
    one, frozen = expert(), FrozenExpert(*weights())
    parameters = [tensor.detach().requires_grad_() for tensor in one.trained]
    trained = one.with_trained(parameters)
    x_TD, dy_TD = torch.randn(30, HIDDEN), torch.randn(30, HIDDEN)
    index = torch.randint(2, (30, 1))
    experts: list[OwnedExpert] = [frozen, trained]
    y_TD = apply_experts(x_TD, index, torch.ones(30, 1), experts)
    y_TD.backward(dy_TD)
    rows = index[:, 0] == 1
    for parameter, wanted in zip(parameters, reference(one, x_TD[rows], dy_TD[rows]), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_all_weights_come_down_to_the_same() -> None:
    one, x_ND, dy_ND = expert(), torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    dense = [matrix.detach().double().requires_grad_() for matrix in one.dense()]
    full = torch.autograd.grad((run_expert(x_ND.double(), *dense) * dy_ND.double()).sum(), dense)
    for got, wanted in zip(one.project(full[0].float(), full[1].float()), reference(one, x_ND, dy_ND), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_its_state_is_all_of_it() -> None:
    one = expert()
    again = LoraExpert.read(dict(one.tensors), HIDDEN, WIDTH)
    assert all(map(torch.equal, again.dense(), one.dense()))
    base, factors = lora_bytes(HIDDEN, WIDTH, RANK)
    assert base == sum(tensor.nbytes for tensor in one.base.tensors.values())
    assert factors == sum(tensor.numel() for tensor in one.trained)


@pytest.mark.parametrize("name", ["codes", "absmax", "nested_absmax", "offset", "scale", "gate_up_a", "down_b"])
@pytest.mark.parametrize("damage", ["gone", "short", "nan"])
def test_damaged_state_is_refused(name: str, damage: str) -> None:
    state = dict(expert().tensors)
    if damage == "gone":
        del state[name]
    elif damage == "short":
        state[name] = torch.cat([state[name].flatten(), state[name].flatten()])
    else:
        state[name] = torch.full_like(state[name].float(), torch.nan)
    with pytest.raises(ValueError, match=name):
        LoraExpert.read(state, HIDDEN, WIDTH)


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_impossible_ranks(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        LoraExpert.of(*weights(), rank=rank, alpha=1)
