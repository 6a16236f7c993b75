"""`shoal plan`: what it computes, against what composers hold, and against sizes counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shoal.benchmarks.costs import state_bytes
from shoal.node.capacity import BACKBONE_BYTES, slot_bytes, working_bytes
from shoal.node.cli import main
from shoal.node.config import parse_gib
from shoal.node.errors import ConfigError
from shoal.node.learning.composer import Composer
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.model.init import expert_shape
from shoal.node.model.presets import preset
from shoal.node.plan import GIB, PROCESSES, plan_of
from shoal.node.run.manifest import Manifest, ModelSpec, StandInSpec
from shoal.node.sketches.sketch_choice import traffic_of
from transformers import LlamaConfig, MixtralConfig


def manifest(name: str = "tiny") -> Manifest:
    chosen = preset(name)
    return Manifest(
        name="plan", founder="none", created_at=0, model=chosen.model, data=chosen.data, train=chosen.train,
        outer=chosen.outer, standin=chosen.standin,
    )  # fmt: skip


@pytest.mark.parametrize("owned", [0, 4, 16])
def test_memory_is_what_a_composer_holds(owned: int) -> None:
    found = plan_of(manifest(), 8.0, 4)
    batch = torch.randint(0, 256, (4, 256))
    composer = Composer(manifest(), owned=range(owned), next_batch=lambda: batch)
    composer.train_step()
    gradients = 4 * (found.backbone_weights + owned * found.slot_weights)
    held = state_bytes(composer) + gradients
    standins = found.standins * (16 - owned) / 16
    planned = found.backbone + standins + owned * found.slot  # without sketches: there is no collector
    peak = held + 3 * 4 * owned * found.slot_weights  # while a checkpoint is written
    assert 0.95 * peak <= planned <= 1.3 * peak, "rather too much than too little"


def test_slots_that_fit() -> None:
    small = plan_of(manifest("small"), 2.0, 4)
    assert 0 < small.composer_slots < small.slots
    used = PROCESSES + small.backbone + small.standins * (1 - small.composer_slots / small.slots)
    assert used + small.composer_slots * small.slot <= 2 * GIB
    assert plan_of(manifest("small"), 1.5, 4).composer_slots == -1
    assert plan_of(manifest("small"), 64.0, 4).composer_slots == small.slots


def test_weights_of_the_preset() -> None:
    found = plan_of(manifest("small"), 8.0, 8)
    assert found.expert_weights == 6 * 64 * 3 * 256 * 128
    assert found.slot_weights == 6 * 3 * 256 * 128
    assert found.active_weights == found.backbone_weights + 8 * found.slot_weights
    assert found.backbone == BACKBONE_BYTES * found.backbone_weights
    assert found.sketches_per_token == 8 * 6 * (1 - 1 / 8) * 2 * (256 + 2)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "small", "--memory", "8", "--tokens-per-second", "100"]) == 0
    told = capsys.readouterr().out
    assert "64 of 64 slots fit 8 GiB" in told
    assert "Mbit/s" in told
    MixtralConfig(num_local_experts=4, hidden_size=64, num_hidden_layers=2, vocab_size=500).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--json", "--set", "standin.kind=ternary"]) == 0
    assert json.loads(capsys.readouterr().out)["slots"] == 4
    assert main(["plan", str(tmp_path), "--set", "foo=2"]) == 2
    assert "foo=2" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nothing")]) == 2
    assert "no preset and no checkpoint" in capsys.readouterr().err
    for nobody in ("0", "-1"):
        assert main(["plan", "small", "--composers", nobody]) == 2
        assert f"--composers {nobody} share nothing" in capsys.readouterr().err
    for speed in ("-3", "0", "nan"):
        assert main(["plan", "small", "--tokens-per-second", speed]) == 2
        assert "is no speed" in capsys.readouterr().err
    for rank in ("-5", "0", "1000"):
        assert main(["plan", "small", "--expert-mode", "lora", "--lora-rank", rank]) == 2
        assert "give --lora-rank" in capsys.readouterr().err


def test_a_dense_model_is_one_to_upcycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=500).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path)]) == 2
    assert "shoal upcycle" in capsys.readouterr().err


def test_how_many_experts_a_token_takes_is_known_under_every_name() -> None:
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
        "num_key_value_heads": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0,
    }  # fmt: skip
    config = {"model_type": "ernie4_5_moe", **sizes, "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 0}
    run = Manifest(name="plan", founder="none", created_at=0, model=ModelSpec(config=config))
    found = plan_of(run, 8.0, 4)
    assert found.active_weights == found.backbone_weights + 3 * found.slot_weights
    assert found.sketches_per_token == pytest.approx(3 * 2 * 3 / 4 * 2 * (32 + 2))  # top-k, layers, others', x and dy
    assert traffic_of(run).top_k == 3


def test_low_rank_training_fits_ten_times_the_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with experts of a size that people train, on a card of 24 GB."""
    config = MixtralConfig(
        hidden_size=2048, intermediate_size=1024, num_local_experts=64, num_hidden_layers=16, num_key_value_heads=4
    )
    (tmp_path / "config.json").write_text(config.to_json_string())
    slots = {}
    for mode in ("full", "lora"):
        command = ["plan", str(tmp_path), "--memory", "24GB", "--device", "cuda", "--expert-mode", mode, "--json"]
        assert main([*command, "--lora-rank", "8"]) == 0
        slots[mode] = json.loads(capsys.readouterr().out)["worker_slots"]
    how = ExpertMode(manifest().train, "lora", 8)
    shape = expert_shape(ModelSpec(config=config.to_dict()))
    room = 24e9 - working_bytes(shape, how)
    assert slots["lora"] == min(64, room // slot_bytes(shape, StandInSpec(), torch.device("cuda"), how))
    assert slots["lora"] >= 5 * slots["full"] > 0


@pytest.mark.parametrize(
    ("text", "gib"), [("24", 24.0), ("24GiB", 24.0), ("16 gib", 16.0), ("24GB", 22.3517), ("1.5", 1.5)]
)
def test_amounts_of_memory(text: str, gib: float) -> None:
    assert parse_gib(text) == pytest.approx(gib, rel=1e-4)


@pytest.mark.parametrize("text", ["", "0", "24MB", "many", "-3"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB"):
        parse_gib(text)
