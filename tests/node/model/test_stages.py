"""Stages run one after another are the model: outputs, gradients, and router losses of microbatches as of one batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from shoal.node.model.build import MoEModel, build_model
from shoal.node.model.stages import Stage, Weighing, build_stage, check_stages, spans
from shoal.node.run.manifest import ModelSpec, StandInSpec
from torch import Tensor

LAYERS, VOCABULARY = 4, 64
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "mixtral": {"num_local_experts": 6, "sliding_window": 4},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {
        "n_routed_experts": 6, "moe_intermediate_size": 24, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "qwen3_next": {
        "num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8, "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
}  # fmt: skip
DO_MORE: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 6, "embedding_multiplier": 3.0},
    "jamba": {
        "num_experts": 6, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1,
        "attn_layer_offset": 0, "use_mamba_kernels": False,
    },
    "afmoe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8, "num_dense_layers": 0, "mup_enabled": True},
}  # fmt: skip


def spec_of(family: str, **overrides: Any) -> ModelSpec:
    private = overrides.pop("private_layers", 0)
    config = {
        "model_type": family, "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
        "num_experts_per_tok": 2, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None, **FAMILIES.get(family, {}), **overrides,
    }  # fmt: skip
    return ModelSpec(config=config, seed=random.randrange(1 << 30), private_layers=private)


def whole(spec: ModelSpec) -> MoEModel:
    return build_model(spec, owned={0, 3}, standin=StandInSpec())


def through(stages: list[Stage], tokens: Tensor, weighing: Weighing) -> float:
    """All microbatches forward, then all of them back, as a pipeline's schedule does. Returns the loss."""
    for stage in stages:
        stage.begin(weighing)
    losses = []
    for part in tokens.chunk(weighing.microbatches):
        x = part
        for stage in stages:
            x = stage(x)
        losses.append(stages[-1].loss(x, part))
    for loss in losses:
        loss.backward()
    return float(sum(loss.item() for loss in losses))


@pytest.mark.parametrize(("family", "stages"), [*((family, 2) for family in FAMILIES), ("qwen3_moe", 4)])
def test_stages_of_microbatches_learn_what_the_model_learns_of_the_batch(family: str, stages: int) -> None:
    spec = spec_of(family)
    one, other = whole(spec), whole(spec)
    tokens = torch.randint(0, VOCABULARY, (4, 12))
    moe_layers = len(one.all_shards)
    counts = torch.randint(0, 50, (moe_layers, 6))
    expected = one.loss(tokens, swarm_counts=counts, balance_coef=3.0, z_coef=0.5)
    expected.total.backward()
    cut = [Stage(other, span) for span in spans(spec, stages)]
    loss = through(cut, tokens, Weighing(counts, 3.0, 0.5, microbatches=2))
    assert loss == pytest.approx(expected.lm.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat([stage.counts_LE for stage in cut]), expected.counts)
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None, name
        else:
            torch.testing.assert_close(
                theirs[name].grad, parameter.grad, rtol=1e-3, atol=2e-5 * float(parameter.grad.abs().max()), msg=name
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_layers_make_stages_are_told_from_others(family: str) -> None:
    spec = spec_of(family)
    check_stages(whole(spec), spans(spec, 2))


@pytest.mark.parametrize("family", DO_MORE)
def test_families_that_do_more_around_their_layers_make_no_stages(family: str) -> None:
    spec = spec_of(family, **DO_MORE[family])
    with pytest.raises(ValueError, match=f"layers of {family} do not make stages"):
        check_stages(whole(spec), spans(spec, 2))


def test_a_stage_holds_only_its_own_layers() -> None:
    spec = spec_of("qwen3_moe", private_layers=1)
    model, held = whole(spec), 0
    for rank, span in enumerate(spans(spec, 2)):
        alone = build_stage(spec, span)
        mine, theirs = Stage(alone, span), Stage(model, span)
        assert {n: p.shape for n, p in mine.backbone.items()} == {n: p.shape for n, p in theirs.backbone.items()}
        assert [shard.layer for shard in mine.shards] == [shard.layer for shard in theirs.shards] == [[0], [1, 2]][rank]
        held += sum(p.numel() for p in alone.parameters())
    assert held == sum(p.numel() for p in model.backbone.values())


def test_layers_go_round() -> None:
    spec = ModelSpec(config=tiny.CONFIG | {"num_hidden_layers": 5})
    assert [(span.first, span.end) for span in spans(spec, 2)] == [(0, 3), (3, 5)]
    assert [(span.moe_first, span.moe_end) for span in spans(spec, 3)] == [(0, 2), (2, 4), (4, 5)]
    with pytest.raises(ValueError, match="do not make 6 stages"):
        spans(spec, 6)
    with pytest.raises(ValueError, match="do not make 2 stages"):
        spans(ModelSpec(config=spec.config, private_layers=3), 2)
