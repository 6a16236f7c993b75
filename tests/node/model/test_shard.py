"""The expert shard: ownership that comes and goes, stand-ins, capacity, and what it lets others see."""

from __future__ import annotations

import copy

import pytest
import torch
from shoal.kernels.standin import initial_standin
from shoal.node.model.build import MoEModel, build_model
from shoal.node.model.presets import preset
from shoal.node.model.shard import ExpertShard
from shoal.node.run.manifest import ModelSpec, StandInSpec
from torch import Tensor

SPEC = ModelSpec(config={**preset("tiny").model.config, "initializer_range": 0.2}, seed=3)
GATE_UP, DOWN = (128, 64), (64, 64)


def fresh(owned: list[int], capacity_factor: float = 0.0) -> MoEModel:
    spec = ModelSpec(config=SPEC.config, seed=SPEC.seed, capacity_factor=capacity_factor)
    return build_model(spec, owned=owned, standin=StandInSpec(kind="lowbit"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    seed = torch.seed() % 2**31
    print("seed", seed)
    return torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(seed))


def logits(model: MoEModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens)
    return out


def test_a_stand_in_is_its_dense_weights(tokens: Tensor) -> None:
    """Adopting what a stand-in stands for changes no logit; neither does releasing to that stand-in again."""
    model = fresh([1])
    before = logits(model, tokens)
    for slot in (0, 7, 15):
        standins = [shard.standin(slot) for shard in model.shards]
        for shard, standin in zip(model.shards, standins, strict=True):
            shard.adopt(slot, *standin.dense())
        torch.testing.assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-5)
        for shard, standin in zip(model.shards, standins, strict=True):
            shard.release(slot, standin)
    assert all(shard.owned == [1] for shard in model.shards)
    assert torch.equal(logits(model, tokens), before)


def test_ownership_by_way_of_adoption_is_ownership_from_the_start(tokens: Tensor) -> None:
    grown = fresh([])
    for slot in range(16):
        for layer, shard in enumerate(grown.shards):
            shard.adopt(slot, *grown.initial_expert(layer, slot))
    assert torch.equal(logits(grown, tokens), logits(fresh(list(range(16))), tokens))


def test_stand_ins_can_be_replaced(tokens: Tensor) -> None:
    model = fresh([1])
    before = logits(model, tokens)
    others = [slot for slot in range(16) if slot != 1]  # all of them: no token need be routed to any one
    old = {slot: model.shards[0].standin(slot) for slot in others}
    for slot in others:
        gate_up, down = model.initial_expert(0, slot)
        model.shards[0].set_standin(slot, initial_standin("lowbit", gate_up * 3, down, 16))
    assert not torch.allclose(logits(model, tokens), before)
    for slot, standin in old.items():
        model.shards[0].set_standin(slot, standin)
    assert torch.equal(logits(model, tokens), before)


def test_gradients_reach_the_backbone_and_owned_experts_with_tokens_only(tokens: Tensor) -> None:
    model = fresh([1, 2, 3])
    model.loss(tokens).total.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.values())
    for layer, shard in enumerate(model.shards):
        for slot in (1, 2, 3):
            expert = model.experts_of(slot)[layer]
            assert (expert.gate_up.grad is None) == (expert.down.grad is None) == (shard.counts[slot].item() == 0)


def test_an_expert_without_tokens_has_no_gradient() -> None:
    shard = ExpertShard(layer=0, num_experts=3, hidden=4, width=5, act="silu", capacity_factor=0.0)
    for slot in range(3):
        shard.adopt(slot, torch.randn(10, 4), torch.randn(4, 5))
    index = torch.tensor([[0, 2], [2, 0]])
    shard(torch.randn(2, 4), index, torch.rand(2, 2)).sum().backward()
    assert [shard.expert(slot).gate_up.grad is None for slot in range(3)] == [False, True, False]
    assert shard.counts.tolist() == [2, 0, 2]


def test_no_parameter_outlives_its_release(tokens: Tensor) -> None:
    model = fresh([1, 2])
    names = set(model.backbone)
    gone = {id(t) for e in model.experts_of(2) for t in (e.gate_up, e.down)}
    for layer, shard in enumerate(model.shards):
        shard.release(2, initial_standin("lowbit", *model.initial_expert(layer, 2), 16))
    assert not gone & {id(p) for p in model.parameters()}
    assert set(model.backbone) == names
    with pytest.raises(ValueError, match="not owned"):
        model.experts_of(2)


def test_adoption_copies_and_refuses_what_does_not_fit() -> None:
    model = fresh([1])
    shard = model.shards[0]
    gate_up, down = torch.randn(GATE_UP), torch.randn(DOWN)
    expert = shard.adopt(0, gate_up, down)
    gate_up.zero_()
    assert expert.gate_up.detach().any()
    assert shard.expert(0) is expert
    held = copy.copy(shard.owned)
    for slot, shapes in ((0, (GATE_UP, DOWN)), (16, (GATE_UP, DOWN)), (2, (DOWN, DOWN)), (2, (GATE_UP, GATE_UP))):
        with pytest.raises(ValueError, match="slot"):
            shard.adopt(slot, torch.randn(shapes[0]), torch.randn(shapes[1]))
    with pytest.raises(ValueError, match="owned"):
        shard.set_standin(1, shard.standin(5))
    with pytest.raises(ValueError, match="not owned"):
        shard.release(5, shard.standin(5))
    with pytest.raises(ValueError, match="stand-in"):
        shard.standin(1)
    with pytest.raises(ValueError, match="slot"):
        build_model(SPEC, owned=[16], standin=StandInSpec())
    assert shard.owned == held


def test_the_tap_sees_the_rows_of_owned_experts(tokens: Tensor) -> None:
    model = fresh([1, 5])
    seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    inputs: list[tuple[Tensor, ...]] = []
    for shard in model.shards:
        shard.register_forward_pre_hook(lambda _m, args: inputs.append(args))
    model.set_tap(lambda layer, slot, x, gate: seen.setdefault((layer, slot), []).append((x, gate)))
    losses = model.loss(tokens)
    losses.total.backward()
    model.set_tap(None)
    model.loss(tokens)
    assert seen.keys() == {(layer, slot) for layer in range(3) for slot in (1, 5) if losses.counts[layer, slot]}
    for (layer, slot), calls in seen.items():
        ((x_ND, gate_N),) = calls
        x, index, weights = inputs[layer]
        token, k = torch.where(index == slot)
        assert not x_ND.requires_grad
        assert torch.equal(x_ND, x[token])
        assert torch.equal(gate_N, weights[token, k])


@pytest.mark.parametrize("factor", [0.25, 1.0, 16.0])
def test_capacity_drops_the_weakest_pairs(factor: float) -> None:
    num_tokens, top_k, num_experts = 40, 2, 4
    limited = ExpertShard(layer=0, num_experts=num_experts, hidden=8, width=6, act="silu", capacity_factor=factor)
    free = ExpertShard(layer=0, num_experts=num_experts, hidden=8, width=6, act="silu", capacity_factor=0.0)
    for slot in range(num_experts):
        weights = torch.randn(12, 8), torch.randn(8, 6)
        limited.adopt(slot, *weights)
        free.adopt(slot, *weights)
    x = torch.randn(num_tokens, 8)
    # Uneven on purpose: expert 0 is everybody's first choice.
    index = torch.stack([torch.zeros(num_tokens, dtype=torch.long), torch.randint(1, num_experts, (num_tokens,))], 1)
    gates = torch.rand(num_tokens, top_k)
    capacity = -(-int(factor * num_tokens * top_k) // num_experts)
    kept = torch.zeros_like(gates, dtype=torch.bool)
    for expert in range(num_experts):
        token, k = torch.where(index == expert)
        strongest = gates[token, k].argsort(descending=True)[:capacity]
        kept[token[strongest], k[strongest]] = True
    torch.testing.assert_close(limited(x, index, gates), free(x, index, gates * kept))
    assert bool(kept.all()) == (factor == 16.0)
    assert limited.counts.tolist() == free.counts.tolist() == index.flatten().bincount(minlength=num_experts).tolist()


def test_capacity_is_configuration(tokens: Tensor) -> None:
    assert not torch.allclose(logits(fresh([0], capacity_factor=0.5), tokens), logits(fresh([0]), tokens))
    assert torch.equal(logits(fresh([0], capacity_factor=16.0), tokens), logits(fresh([0]), tokens))


def test_training_and_evaluation_are_one_forward(tokens: Tensor) -> None:
    config = {**SPEC.config, "attention_dropout": 0.5}
    model = build_model(ModelSpec(config=config), owned=[1], standin=StandInSpec())
    model.train()
    training = logits(model, tokens)
    model.eval()
    assert torch.equal(training, logits(model, tokens))
