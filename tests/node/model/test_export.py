"""Exported checkpoints load with plain transformers and are the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from shoal.node.model.build import MoEModel, build_model
from shoal.node.model.export import write_checkpoint
from shoal.node.run.manifest import ModelSpec, StandInSpec
from transformers import AutoModelForCausalLM

CONFIGS = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8},
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {
        "n_routed_experts": 6,
        "moe_intermediate_size": 24,
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


def whole_model(family: str, **overrides: object) -> MoEModel:
    config = {
        "model_type": family,
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **CONFIGS[family],
        **overrides,
    }
    spec = ModelSpec(config=config, seed=int(torch.seed()) % 2**31)
    print("seed", spec.seed)
    return build_model(spec, owned=range(6), standin=StandInSpec())


def write(model: MoEModel, folder: Path, **options: object) -> None:
    def expert_of(layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.shards[layer].expert(slot).dense()

    write_checkpoint(folder, model.spec, model.backbone, expert_of, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip_through_plain_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    model = whole_model(family, tie_word_embeddings=tied)
    write(model, tmp_path, card="# A model\n")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    tokens = torch.randint(97, (2, 20))
    with torch.no_grad():
        ours, theirs = model(tokens), loaded.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "README.md").read_text() == "# A model\n"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(loaded).__name__]
    assert (tmp_path / "generation_config.json").exists()


def test_large_models_are_split_and_memory_is_one_shard(tmp_path: Path) -> None:
    model = whole_model("qwen3_moe")
    limit = 6 * 3 * 24 * 32 * 4  # one layer's experts
    write(model, tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) >= 3
    total = 0
    for file in files:
        with safe_open(file, "pt") as stored:
            sizes = [stored.get_tensor(name).nbytes for name in index["weight_map"] if name in set(stored.keys())]
        assert sum(sizes) <= limit
        total += sum(sizes)
    assert total == index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    tokens = torch.randint(97, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), loaded.eval()(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    # A smaller one in the same folder leaves nothing of the split one that a loader would prefer.
    write(model, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "expert"])
def test_bad_tensors_are_refused(fault: str, tmp_path: Path) -> None:
    model = whole_model("olmoe")
    backbone: dict[str, torch.Tensor] = dict(model.backbone)
    name = "model.norm.weight"
    good = model.shards[0].expert(0).dense()
    expert = good
    if fault == "missing":
        del backbone[name]
    elif fault == "shape":
        backbone[name] = torch.zeros(31)
    elif fault == "nan":
        backbone[name] = torch.full((32,), torch.nan)
    else:
        expert = (good[0][:-1], good[1])
    with pytest.raises(ValueError, match=name if fault != "expert" else "expert 0 of layer 0"):
        write_checkpoint(tmp_path, model.spec, backbone, lambda _layer, _slot: expert)
    assert not (tmp_path / "config.json").exists()
