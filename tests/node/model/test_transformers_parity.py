"""With every slot owned, the model is transformers' own: same logits, same gradients, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoal.node.model.build import MoEModel, build_model
from shoal.node.run.manifest import ModelSpec, StandInSpec
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,  # large, so that routing is uneven and nothing hides below the tolerance
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "qwen3_moe softmax before top-k": {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": False,
    },
    "mixtral": {"num_local_experts": 6, "sliding_window": None},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {
        "n_routed_experts": 6,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "glm4_moe": {
        "n_routed_experts": 6,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
}


def spec_of(family: str, seed: int = 0, **overrides: Any) -> ModelSpec:
    config = {"model_type": family, **SMALL, **FAMILIES[family], **overrides}
    return ModelSpec(config=config, seed=seed)


def reference_of(model: MoEModel) -> PreTrainedModel:
    """Plain transformers with our weights, copied across by name, experts fused slot by slot."""
    values = dict(model.spec.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    reference.eval()
    theirs = {**dict(reference.named_parameters()), **reference.state_dict(keep_vars=True)}  # with selection biases
    with torch.no_grad():
        for name, parameter in model.backbone.items():
            theirs.pop(name).copy_(parameter)
        names = dict(model.network.named_modules())
        for shard in model.shards:
            (path,) = (name for name, module in names.items() if module is shard)
            gate_up, down = theirs.pop(f"{path}.gate_up_proj"), theirs.pop(f"{path}.down_proj")
            for slot in range(model.num_slots):
                gate_up[slot].copy_(shard.expert(slot).gate_up)
                down[slot].copy_(shard.expert(slot).down)
    assert not theirs  # every parameter of theirs is ours
    return reference


@pytest.fixture(scope="module")
def seed() -> int:
    drawn = int(torch.seed()) % 2**31
    print("seed", drawn)
    return drawn


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family: str, seed: int) -> None:
    spec = spec_of(family, seed)
    model = build_model(spec, owned=range(6), standin=StandInSpec())
    reference = reference_of(model)
    tokens = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens)
    expected = reference(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    model.loss(tokens).lm.backward()
    reference(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    theirs = {name: p.grad for name, p in reference.state_dict(keep_vars=True).items()}
    scale = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    for name, parameter in model.backbone.items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
        else:
            assert parameter.grad is None
            assert name.endswith("correction_bias")
    names = {id(module): name for name, module in model.network.named_modules()}
    for shard in model.shards:
        path = names[id(shard)]
        for slot in range(model.num_slots):
            expert = shard.expert(slot)
            for ours, fused in ((expert.gate_up, "gate_up_proj"), (expert.down, "down_proj")):
                expected_grad = theirs[f"{path}.{fused}"]
                assert expected_grad is not None
                if ours.grad is None:
                    assert shard.counts[slot] == 0
                    assert not expected_grad[slot].any()
                else:
                    assert shard.counts[slot] > 0
                    torch.testing.assert_close(ours.grad, expected_grad[slot], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_is_everything_but_routed_experts(family: str) -> None:
    spec = spec_of(family)
    model = build_model(spec, owned=[1, 4], standin=StandInSpec())
    trained = {id(p) for p in model.parameters()}
    experts = {id(t) for slot in (1, 4) for e in model.experts_of(slot) for t in (e.gate_up, e.down)}
    backbone = {id(p) for p in model.backbone.values()}
    assert backbone | experts == trained
    assert not backbone & experts
    assert len(model.backbone) == len(backbone)


def test_tied_weights_are_listed_once() -> None:
    untied = build_model(spec_of("qwen3_moe", tie_word_embeddings=False), owned=(), standin=StandInSpec())
    tied = build_model(spec_of("qwen3_moe", tie_word_embeddings=True), owned=(), standin=StandInSpec())
    assert untied.backbone.keys() - tied.backbone.keys() == {"lm_head.weight"}
    assert tied.network.lm_head.weight is tied.network.model.embed_tokens.weight


def test_normalisation_after_top_k_is_the_configs(seed: int) -> None:
    """Gates sum to one if `norm_topk_prob`, to the chosen share of the softmax if not."""
    sums = {}
    for norm in (True, False):
        model = build_model(spec_of("qwen3_moe", seed, norm_topk_prob=norm), owned=range(6), standin=StandInSpec())
        seen: list[torch.Tensor] = []
        model.shards[0].register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[2]))
        model(torch.randint(97, (2, 16)))
        sums[norm] = seen[0].sum(dim=-1)
    torch.testing.assert_close(sums[True], torch.ones_like(sums[True]))
    assert bool((sums[False] < 0.999).any())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2}, "model_type"),
        ({"model_type": "llama", **SMALL}, "no MoE layer"),
        ({"model_type": "gpt_oss", **SMALL}, "scaled_dot_product_attention"),
        ({"model_type": "minimax_m3_vl_text", "num_local_experts": 6, "head_dim": 8, **SMALL}, "gate of its own"),
        ({"model_type": "mixtral", "hidden_act": "relu", **SMALL}, "activation 'relu'"),
        ({"model_type": "zaya", "num_experts": 6, "head_dim": 8, **SMALL, "num_experts_per_tok": 1}, r"\[7\] classes"),
        ({"model_type": "mixtral", "num_local_experts": 6, **SMALL, "num_experts_per_tok": 7}, "cannot route a token"),
    ],
)
def test_configs_without_plain_experts_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelSpec(config=config), owned=(), standin=StandInSpec())
