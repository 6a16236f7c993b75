"""Private layers: their experts are backbone, and everything else is as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shoal.kernels.experts import DenseExpert
from shoal.node.model.build import MoEModel, build_model
from shoal.node.model.export import write_checkpoint
from shoal.node.model.init import backbone_shapes, expert_shape, expert_weights, private_weights
from shoal.node.run.manifest import ModelSpec, StandInSpec
from shoal.protocol.averaging.fragments import flatten, partition, unflatten
from torch import Tensor
from transformers import AutoModelForCausalLM

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCABULARY = 3, 6, 32, 24, 97

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "head_dim": 8},
    "mixtral": {"num_local_experts": EXPERTS},
    # One dense layer comes before the MoE layers, and routers score by sigmoids.
    "deepseek_v3": {
        "num_hidden_layers": LAYERS + 1,
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def spec_of(private: int, family: str = "qwen3_moe", *, seed: int, **overrides: object) -> ModelSpec:
    config = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": WIDTH,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **FAMILIES[family],
        **overrides,
    }
    return ModelSpec(config=config, seed=seed, private_layers=private)


@pytest.fixture
def seed() -> int:
    drawn = int(torch.seed()) % 2**31
    print("seed", drawn)
    return drawn


def build(spec: ModelSpec, owned: range = range(EXPERTS)) -> MoEModel:
    return build_model(spec, owned=owned, standin=StandInSpec())


def some_tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 24))


def all_experts(model: MoEModel) -> list[list[DenseExpert]]:
    """By MoE layer and expert, private ones too."""
    return [[shard.expert(e) for e in range(EXPERTS)] for shard in model.all_shards]


def all_private(model: MoEModel) -> list[list[DenseExpert]]:
    """By private layer and expert."""
    return [[shard.expert(e) for e in range(EXPERTS)] for shard in model.all_shards[: model.spec.private_layers]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("private", [1, 2])
def test_the_network_is_the_same_to_the_bit(family: str, private: int, seed: int) -> None:
    """Forward, losses and gradients of a model held in full do not depend on what is private."""
    tokens = some_tokens()
    plain, ours = build(spec_of(0, family, seed=seed)), build(spec_of(private, family, seed=seed))
    losses = [model.loss(tokens) for model in (plain, ours)]
    assert losses[1].counts.shape == (LAYERS, EXPERTS)
    for name in ("lm", "balance", "z", "total", "counts"):
        assert torch.equal(getattr(losses[0], name), getattr(losses[1], name)), name
    for each in losses:
        each.total.backward()
    for row, (theirs, own) in enumerate(zip(all_experts(plain), all_experts(ours), strict=True)):
        for number, (one, other) in enumerate(zip(theirs, own, strict=True)):
            for left, right in ((one.gate_up, other.gate_up), (one.down, other.down)):
                assert torch.equal(left, right)
                assert (left.grad is None) == (right.grad is None) == (losses[0].counts[row, number].item() == 0)
                assert left.grad is None or torch.equal(left.grad, right.grad)
    swarm = torch.randint(0, 9, (LAYERS, EXPERTS))
    assert torch.equal(*(model.loss(tokens, swarm_counts=swarm).balance for model in (plain, ours)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("private", [0, 1, 2])
def test_shapes_of_the_backbone_are_known_without_building_it(private: int, family: str, tied: bool, seed: int) -> None:
    spec = spec_of(private, family, seed=seed, tie_word_embeddings=tied)
    model = build(spec, range(2))
    assert backbone_shapes(spec) == {name: tuple(p.shape) for name, p in model.backbone.items()}
    experts = [name for name in model.backbone if ".mlp.experts." in name]
    assert len(experts) == 2 * EXPERTS * private
    expert = {id(t) for layer in range(private) for e in all_private(model)[layer] for t in (e.gate_up, e.down)}
    assert {id(model.backbone[name]) for name in experts} == expert
    assert not {id(p) for shard in model.shards for p in shard.parameters()} & {id(p) for p in model.backbone.values()}


def test_slots_begin_after_the_private_layers(seed: int) -> None:
    plain, spec = spec_of(0, seed=seed), spec_of(2, seed=seed)
    assert (expert_shape(plain).num_layers, expert_shape(spec).num_layers) == (3, 1)
    model = build(spec, range(1, 3))
    assert len(model.shards) == len(model.experts_of(1)) == 1
    for expert in range(EXPERTS):
        assert all(map(torch.equal, expert_weights(spec, 0, expert), expert_weights(plain, 2, expert)))
        for layer in range(2):
            seeded = expert_weights(plain, layer, expert)
            assert all(map(torch.equal, private_weights(spec, layer, expert), seeded))
            assert all(map(torch.equal, all_private(model)[layer][expert].dense(), seeded))
    assert all(map(torch.equal, model.initial_expert(0, 2), model.experts_of(2)[0].dense()))
    for layer in (-1, 1, 2):
        with pytest.raises(ValueError, match="no expert"):
            expert_weights(spec, layer, 0)
    for layer, expert in ((-1, 0), (2, 0), (0, EXPERTS), (0, -1)):
        with pytest.raises(ValueError, match="no expert"):
            private_weights(spec, layer, expert)


def test_nothing_of_private_layers_reaches_the_taps(seed: int) -> None:
    model = build(spec_of(1, seed=seed), range(1, 3))
    inputs: list[Tensor] = []
    for shard in model.all_shards:
        shard.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    owned: dict[tuple[int, int], Tensor] = {}
    others: dict[tuple[int, int], Tensor] = {}
    model.set_tap(lambda layer, slot, x, _gate: owned.update({(layer, slot): x}))
    model.set_sketch_tap(lambda layer, slot, x, _dy, _a, _dh: others.update({(layer, slot): x}))
    losses = model.loss(some_tokens())
    losses.total.backward()
    hit = {(layer, slot) for layer in range(2) for slot in range(EXPERTS) if losses.counts[layer + 1, slot]}
    assert owned.keys() == {key for key in hit if key[1] in (1, 2)}
    assert others.keys() == {key for key in hit if key[1] not in (1, 2)}
    for (layer, _), rows in (owned | others).items():
        assert bool((rows[:, None] == inputs[layer + 1][None]).all(-1).any(-1).all())


def test_private_experts_compute_with_their_masters(seed: int) -> None:
    """What experts of slots compute with is the run's choice; the backbone is what it is."""

    class Negated(DenseExpert):
        def effective(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
            return gate_up, -down

    model = build_model(spec_of(1, seed=seed), owned=range(EXPERTS), standin=StandInSpec(), expert=Negated)
    assert [{type(e) for e in layer} for layer in all_experts(model)] == [{DenseExpert}, {Negated}, {Negated}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("private", [1, 2])
def test_exported_checkpoints_are_the_model(private: int, family: str, tied: bool, seed: int, tmp_path: Path) -> None:
    """Through fragments, as an exporter gets the backbone, after a step that has changed every tensor."""
    spec = spec_of(private, family, seed=seed, tie_word_embeddings=tied)
    model = build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    shapes = backbone_shapes(spec)
    backbone: dict[str, Tensor] = {}
    for fragment in partition(shapes, 3):
        backbone |= unflatten(fragment, flatten(fragment, model.backbone))
    write_checkpoint(
        tmp_path,
        spec,
        {name: flat.view(shapes[name]) for name, flat in backbone.items()},
        lambda layer, slot: model.experts_of(slot)[layer].dense(),
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), loaded.eval()(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    fused = [name for name in stored if name.endswith("experts.gate_up_proj")]
    assert len(fused) == LAYERS
    assert not [name for name in stored if "gate_up_0" in name]


@pytest.mark.parametrize("fault", ["missing", "shape", "nan"])
def test_bad_private_experts_are_not_exported(fault: str, seed: int, tmp_path: Path) -> None:
    model = build(spec_of(1, seed=seed))
    backbone: dict[str, Tensor] = dict(model.backbone)
    name = "model.layers.0.mlp.experts.down_4"
    if fault == "missing":
        del backbone[name]
    else:
        backbone[name] = torch.zeros(WIDTH, HIDDEN) if fault == "shape" else torch.full((HIDDEN, WIDTH), torch.nan)
    with pytest.raises(ValueError, match=r"down_4 is missing|expert 4 of model\.layers\.0\.mlp"):
        write_checkpoint(tmp_path, model.spec, backbone, lambda layer, slot: model.experts_of(slot)[layer].dense())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("private", [-1, LAYERS, LAYERS + 1, 1 << 16])
def test_at_least_one_layer_has_slots(private: int, seed: int, tmp_path: Path) -> None:
    spec = spec_of(private, seed=seed)
    for attempt in (expert_shape, backbone_shapes, build):
        with pytest.raises(ValueError, match="private layers"):
            attempt(spec)
    with pytest.raises(ValueError, match="private layers"):
        write_checkpoint(
            tmp_path, spec, build(spec_of(0, seed=seed)).backbone, lambda layer, slot: (torch.zeros(0),) * 2
        )
