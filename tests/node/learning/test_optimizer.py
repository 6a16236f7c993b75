"""Optimizer state on its way from one peer to another: whole and to the bit, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from shoal.node.learning.optimizer import (
    checked_state,
    experts_group,
    group_of,
    make_optimizer,
    put_state,
    set_rate,
    take_state,
)
from shoal.node.run.manifest import TrainSpec
from torch import Tensor, nn

KINDS = ("adamw", "adamw8bit", "muon")
SHAPES = ((16, 8), (128, 64))  # the 8-bit optimizer keeps small tensors in float32


def parameters(shape: tuple[int, int]) -> dict[str, Tensor]:
    return {"matrix": nn.Parameter(torch.randn(shape)), "bias": nn.Parameter(torch.randn(shape[1]))}


def steps(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for weight, gradient in zip(weights.values(), step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()


def checked(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor | int]:
    return checked_state(optimizer, group_of(optimizer, parameter), parameter.shape, state)


def test_only_matrices_decay() -> None:
    optimizer = make_optimizer(TrainSpec(weight_decay=0.5), parameters((4, 4)))
    decays = [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    assert decays == [(1, 0.5), (1, 0.0), (0, 0.5), (0, 0.5)]


def test_muon_takes_the_matrices_between_embeddings_and_head() -> None:
    shapes = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.gate.weight": (3, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (6, 4),
        "model.layers.0.mixer.conv1d.weight": (4, 1, 3),
        "lm_head.weight": (8, 4),
    }
    backbone = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = make_optimizer(TrainSpec(optimizer="muon"), backbone)
    muons = {name for name, parameter in backbone.items() if group_of(optimizer, parameter).get("orthogonal")}
    assert muons == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.shared_expert.up_proj.weight"}
    assert experts_group(optimizer)["orthogonal"]


def test_one_kind_of_state_is_no_other() -> None:
    """An expert's momentum is no embedding's moments, though both have its shape."""
    weights = {name: nn.Parameter(torch.randn(8, 8)) for name in ("lm_head.weight", "model.layers.0.mlp.down.weight")}
    optimizer = make_optimizer(TrainSpec(optimizer="muon"), weights)
    steps(optimizer, weights, [[torch.randn(8, 8), torch.randn(8, 8)]])
    head, matrix = weights.values()
    for one, other in ((head, matrix), (matrix, head)):
        with pytest.raises(ValueError, match="the optimizer's state holds"):
            checked(optimizer, one, take_state(optimizer, other))


def test_a_rate_of_their_own_under_muon_too() -> None:
    weights = {name: nn.Parameter(torch.zeros(8, 8)) for name in ("model.layers.0.mlp.down.weight", "lm_head.weight")}
    expert = nn.Parameter(torch.zeros(8, 8))
    optimizer = make_optimizer(TrainSpec(optimizer="muon", expert_rate=2.5), weights)
    experts_group(optimizer)["params"].append(expert)
    gradient = torch.randn(8, 8)
    for weight in (*weights.values(), expert):
        weight.grad = gradient.clone()
    set_rate(optimizer, 1e-2)
    optimizer.step()
    matrix, head = weights.values()
    torch.testing.assert_close(expert, 2.5 * matrix)
    torch.testing.assert_close(head.detach(), -1e-2 * gradient.sign())


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_experts_and_vectors_have_rates_of_their_own(kind: str) -> None:
    """AdamW's first step is the learning rate, whatever the gradient."""
    weights, expert = parameters((8, 8)), nn.Parameter(torch.zeros(8, 8))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    spec = TrainSpec(optimizer=kind, expert_rate=2.5, vector_rate=4.0, weight_decay=0.0)
    optimizer = make_optimizer(spec, weights)
    experts_group(optimizer)["params"].append(expert)
    for weight in (*weights.values(), expert):
        weight.grad = torch.ones_like(weight)
    set_rate(optimizer, 1e-2)
    optimizer.step()
    torch.testing.assert_close(weights["matrix"].detach(), before["matrix"] - 1e-2)
    torch.testing.assert_close(weights["bias"].detach(), before["bias"] - 4e-2)
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
        put_state(elsewhere, copies[name], checked(elsewhere, copies[name], take_state(optimizer, weight)))
    steps(optimizer, weights, gradients[3:])
    steps(elsewhere, copies, gradients[3:])
    for name, weight in weights.items():
        assert torch.equal(weight, copies[name])


@pytest.mark.parametrize("grows", [0.01, 0.5, 0.95 / 0.9, 1.0, 2.0, 10.0])
def test_moments_that_gradients_have_left_are_taken(grows: float) -> None:
    """Also of gradients that grow or shrink, by 0.95 / 0.9 just so that the first moment is largest for the second."""
    weights = {"matrix": nn.Parameter(torch.zeros(SHAPES[0]))}
    optimizer = make_optimizer(TrainSpec(beta1=0.9, beta2=0.95), weights)
    sizes = [1e-3 * min(max(grows**step, 1e-25), 1e4) for step in range(200)]
    direction = torch.randn(SHAPES[0])
    for size in sizes:
        steps(optimizer, weights, [[size * direction]])
        state = take_state(optimizer, weights["matrix"])
        assert set(checked(optimizer, weights["matrix"], state)) == set(state)


@pytest.mark.parametrize(("first", "second"), [(100.0, 0.0), (1.0, 0.5), (-1e-6, 0.0)])
def test_moments_that_no_gradients_have_are_refused(first: float, second: float) -> None:
    weights = parameters(SHAPES[0])
    optimizer = make_optimizer(TrainSpec(beta1=0.9, beta2=0.95), weights)
    steps(optimizer, weights, [[torch.randn_like(w) for w in weights.values()] for _ in range(3)])
    state = take_state(optimizer, weights["matrix"])
    state["exp_avg"][3, 2], state["exp_avg_sq"][3, 2] = first, second
    with pytest.raises(ValueError, match="no gradients have these"):
        checked(optimizer, weights["matrix"], state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_a_copy(kind: str) -> None:
    weights = parameters(SHAPES[1])
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    gradients = [[torch.randn_like(w) for w in weights.values()] for _ in range(2)]
    steps(optimizer, weights, gradients[:1])
    taken = take_state(optimizer, weights["matrix"])
    before = {name: value.clone() for name, value in taken.items()}
    put_state(optimizer, weights["matrix"], checked(optimizer, weights["matrix"], taken))
    steps(optimizer, weights, gradients[1:])
    assert all(torch.equal(taken[name], before[name]) for name in taken)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_there_is_no_state(kind: str) -> None:
    weights = parameters(SHAPES[0])
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    assert take_state(optimizer, weights["matrix"]) == {}
    put_state(optimizer, weights["matrix"], checked(optimizer, weights["matrix"], {}))
    assert not optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_an_expert_that_was_trained_for_weeks_is_taken(kind: str) -> None:
    weights = parameters(SHAPES[1])
    optimizer = make_optimizer(TrainSpec(optimizer=kind), weights)
    gradients = [[torch.randn_like(w) for w in weights.values()]]
    steps(optimizer, weights, gradients)
    counted = optimizer.state[weights["matrix"]]["step"]  # a tensor, or a number that grows beyond what float32 counts
    optimizer.state[weights["matrix"]]["step"] = counted + (1 << 24) + 8
    taken = checked(optimizer, weights["matrix"], take_state(optimizer, weights["matrix"]))
    assert int(taken["step"]) == 1 << 24
    put_state(optimizer, weights["matrix"], taken)
    steps(optimizer, weights, gradients)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def first_float(state: dict[str, Tensor], value: float) -> None:
    name = next(n for n, t in state.items() if t.is_floating_point() and t.numel() > 1)
    state[name].view(-1)[0] = value


BAD: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a tensor too few": lambda s: s.pop(next(n for n in s if n != "step")),
    "a tensor too many": lambda s: s.update(extra=torch.zeros(())),
    "no step": lambda s: s.pop("step"),
    "step 0": lambda s: s.update(step=torch.tensor(0.0)),
    "step infinity": lambda s: s.update(step=torch.tensor(math.inf)),
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
    checked(optimizer, weights["matrix"], state)
    BAD[name](state)
    with pytest.raises(ValueError, match=r"."):
        checked(optimizer, weights["matrix"], state)
