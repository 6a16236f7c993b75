"""A run's fragments and cadences, for every family's names of tensors."""

from __future__ import annotations

from typing import Any

import pytest
from shoal.node.model.cut import backbone_fragments, cadences
from shoal.node.model.init import backbone_shapes
from shoal.node.run.manifest import Manifest, ModelSpec, OuterSpec, TrainSpec
from shoal.protocol.averaging.fragments import tier_of

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}
EXPERTS = {
    "qwen3_moe": {"num_experts": 6, "head_dim": 8},
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_tiers_are_what_their_names_say(family: str) -> None:
    shapes = backbone_shapes(ModelSpec(config={"model_type": family, **SIZES, **EXPERTS[family]}))
    by_tier: dict[str, list[str]] = {"embeddings": [], "router": [], "body": []}
    for name in shapes:
        by_tier[tier_of(name)].append(name)
    assert len(by_tier["embeddings"]) == 2
    norms = [name for name in by_tier["router"] if "norm" in name]
    routers = [name for name in by_tier["router"] if ".gate." in name]
    assert sorted(norms + routers) == sorted(by_tier["router"])
    assert len([name for name in routers if name.endswith("weight")]) == SIZES["num_hidden_layers"]
    assert len(norms) >= 2 * SIZES["num_hidden_layers"] + 1
    assert all(len(shapes[name]) == 1 for name in norms)
    assert not any("norm" in name for name in by_tier["body"])
    assert any("_proj" in name for name in by_tier["body"])


def test_each_fragment_has_its_tiers_cadence() -> None:
    model = ModelSpec(config={"model_type": "qwen3_moe", **SIZES, **EXPERTS["qwen3_moe"]})
    outer = OuterSpec(fragments=4, every_steps=24, embeddings_every=48, router_every=6)
    manifest = Manifest(name="run", founder="12D3KooW", created_at=0, model=model, outer=outer)
    fragments = backbone_fragments(manifest)
    found = {tier_of(f.names[0]): c.every for f, c in zip(fragments, cadences(fragments, manifest), strict=True)}
    assert found == {"embeddings": 48, "router": 6, "body": 24}


@pytest.mark.parametrize("growth", [0.25, 1.0, 1.5, 8.0])
def test_a_growing_h_has_as_many_rounds_as_its_mean_says(growth: float) -> None:
    model = ModelSpec(config={"model_type": "qwen3_moe", **SIZES, **EXPERTS["qwen3_moe"]})
    outer, train = OuterSpec(every_steps=6, growth=growth), TrainSpec(steps=500)
    manifest = Manifest(name="run", founder="12D3KooW", created_at=0, model=model, outer=outer, train=train)
    for cadence in cadences(backbone_fragments(manifest), manifest):
        rounds = sum(cadence.before(step) == step for step in range(1, 501))
        assert abs(rounds - 500 / outer.mean_every) <= 1
