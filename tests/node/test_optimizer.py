"""Optimizer state on its way from one peer to another: whole and to the bit, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from shoal.node.learning.optimizer import checked_state, experts_group, make_optimizer, put_state, set_rate, take_state
from shoal.node.run.manifest import TrainSpec
from torch import Tensor, nn

KINDS = ("adamw", "adamw8bit")
SHAPES = ((16, 8), (128, 64))  # the 8-bit optimizer keeps small tensors in float32


def parameters(shape: tuple[int, int]) -> dict[str, Tensor]:
    return {"matrix": nn.Parameter(torch.randn(shape)), "bias": nn.Parameter(torch.randn(shape[1]))}


def steps(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for weight, gradient in zip(weights.values(), step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()


def test_only_matrices_decay() -> None:
    optimizer = make_optimizer(TrainSpec(weight_decay=0.5), parameters((4, 4)))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.5), (1, 0.0), (0, 0.5)]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_have_a_rate_of_their_own(kind: str) -> None:
    """AdamW's first step is the learning rate, whatever the gradient."""
    weights, expert = parameters((8, 8)), nn.Parameter(torch.zeros(8, 8))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = make_optimizer(TrainSpec(optimizer=kind, expert_rate=2.5, weight_decay=0.0), weights)
    experts_group(optimizer)["params"].append(expert)
    for weight in (*weights.values(), expert):
        weight.grad = torch.ones_like(weight)
    set_rate(optimizer, 1e-2)
    optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), before[name] - 1e-2)
    torch.testing.assert_close(expert.detach(), torch.full((8, 8), -2.5e-2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_state_moves_to_the_bit(kind: str, shape: tuple[int, int]) -> None:
    weights = parameters(shape)
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    gradients = [[torch.randn_like(w) for w in weights.values()] for _ in range(6)]
    steps(optimizer, weights, gradients[:3])

    copies = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    elsewhere = make_optimizer(TrainSpec(optimizer=kind), copies)
    for name, weight in weights.items():
        put_state(elsewhere, copies[name], checked_state(elsewhere, weight.shape, take_state(optimizer, weight)))
    steps(optimizer, weights, gradients[3:])
    steps(elsewhere, copies, gradients[3:])
    for name, weight in weights.items():
        assert torch.equal(weight, copies[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_a_copy(kind: str) -> None:
    weights = parameters(SHAPES[1])
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    gradients = [[torch.randn_like(w) for w in weights.values()] for _ in range(2)]
    steps(optimizer, weights, gradients[:1])
    taken = take_state(optimizer, weights["matrix"])
    before = {name: value.clone() for name, value in taken.items()}
    put_state(optimizer, weights["matrix"], checked_state(optimizer, weights["matrix"].shape, taken))
    steps(optimizer, weights, gradients[1:])
    assert all(torch.equal(taken[name], before[name]) for name in taken)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_there_is_no_state(kind: str) -> None:
    weights = parameters(SHAPES[0])
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    assert take_state(optimizer, weights["matrix"]) == {}
    put_state(optimizer, weights["matrix"], checked_state(optimizer, weights["matrix"].shape, {}))
    assert not optimizer.state


def first_float(state: dict[str, Tensor], value: float) -> None:
    name = next(n for n, t in state.items() if t.is_floating_point() and t.numel() > 1)
    state[name].view(-1)[0] = value


BAD: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a tensor too few": lambda s: s.pop(next(n for n in s if n != "step")),
    "a tensor too many": lambda s: s.update(extra=torch.zeros(())),
    "no step": lambda s: s.pop("step"),
    "step 0": lambda s: s.update(step=torch.tensor(0.0)),
    "step NaN": lambda s: s.update(step=torch.tensor(math.nan)),
    "many steps": lambda s: s.update(step=torch.ones(3)),
    "NaN": lambda s: first_float(s, math.nan),
    "infinity": lambda s: first_float(s, math.inf),
    "another shape": lambda s: s.update({n: t.reshape(-1)[:-1] for n, t in s.items() if n != "step"}),
    "another type": lambda s: s.update({n: t.double() for n, t in s.items() if n != "step"}),
    "another optimizer's": lambda s: s.update(state1=s.get("exp_avg", torch.zeros(())), exp_avg=torch.zeros(())),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_state_is_refused(name: str, kind: str, shape: tuple[int, int]) -> None:
    weights = parameters(shape)
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    steps(optimizer, weights, [[torch.randn_like(w) for w in weights.values()]])
    state = take_state(optimizer, weights["matrix"])
    checked_state(optimizer, weights["matrix"].shape, state)
    BAD[name](state)
    with pytest.raises(ValueError, match=r"."):
        checked_state(optimizer, weights["matrix"].shape, state)
