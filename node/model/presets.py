"""Run presets: everything a manifest says about what is trained and how, under one name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..run.manifest import DataSpec, ModelSpec, OuterSpec, SketchSpec, StandInSpec, TrainSpec


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The parts of a manifest that a founder chooses together."""

    model: ModelSpec
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    outer: OuterSpec = field(default_factory=OuterSpec)
    standin: StandInSpec = field(default_factory=StandInSpec)
    sketch: SketchSpec = field(default_factory=SketchSpec)


def _bytes_config(context: int, **family: Any) -> dict[str, Any]:
    """A config over raw bytes: 256 tokens, none of them special."""
    return {
        "vocab_size": 256,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family,
    }


def _tiny() -> Preset:
    """Fine-grained Qwen3-MoE that trains on one CPU core: for the demo and the tests."""
    config = _bytes_config(
        256,
        model_type="qwen3_moe",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        intermediate_size=256,  # of dense layers: there are none
        norm_topk_prob=True,
        initializer_range=0.06,  # the usual 0.02 is for wide models: at width 64 it costs hundreds of steps
    )
    # In a run this short experts move fast: close copies matter more than frequent merges (docs/evidence/merging.md).
    return Preset(
        model=ModelSpec(config=config),
        train=TrainSpec(optimizer="muon", learning_rate=0.012),
        outer=OuterSpec(every_steps=24),
        standin=StandInSpec(publish_every=2, refit_steps=24),
        sketch=SketchSpec(codec="int4"),
    )


def _small() -> Preset:
    """Fine-grained Qwen3-MoE of 39M parameters, 6M of them active: a few CPU cores or any GPU."""
    config = _bytes_config(
        512,
        model_type="qwen3_moe",
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=128,
        intermediate_size=1024,  # of dense layers: there are none
        norm_topk_prob=True,
    )
    return Preset(
        model=ModelSpec(config=config),
        data=DataSpec(context_length=512),
        train=TrainSpec(steps=5000, batch_size=8, learning_rate=1e-3, warmup_steps=200),
        sketch=SketchSpec(codec="int4"),
    )


def _bench() -> Preset:
    """The model of the design's measurements: one shared expert beside sixteen routed ones, softmax before top-k."""
    config = _bytes_config(
        256,
        model_type="qwen2_moe",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        intermediate_size=256,  # of dense layers: there are none
        norm_topk_prob=True,
    )
    return Preset(model=ModelSpec(config=config), standin=StandInSpec(refit_steps=24))


def _recipe(experts: int, top_k: int, width: int) -> Preset:
    config = _bytes_config(
        256,
        model_type="qwen3_moe",
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        intermediate_size=512,  # of dense layers: there are none
        norm_topk_prob=True,
        initializer_range=0.04,  # between the usual 0.02 and what `tiny` needs at half the width
    )
    return Preset(model=ModelSpec(config=config), standin=StandInSpec(publish_every=2, refit_steps=24))


def _standard() -> Preset:
    """Few wide experts: 8, of which each token takes 2. To be compared with `fine-grained`."""
    return _recipe(experts=8, top_k=2, width=256)


def _fine_grained() -> Preset:
    """Many narrow experts: 64, of which each token takes 16. As many weights as `standard`, in all and at work."""
    return _recipe(experts=64, top_k=16, width=32)


PRESETS = {
    "tiny": _tiny,
    "small": _small,
    "bench": _bench,
    "standard": _standard,
    "fine-grained": _fine_grained,
}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]()
