"""`shoal found`: what becomes of a preset, a model's config or a checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from shoal.node import cli, logs
from shoal.node.config import PeerConfig
from shoal.node.errors import ConfigError
from shoal.node.learning.tokenizer import byte_tokenizer
from shoal.node.model.init import backbone_shapes
from shoal.node.model.presets import preset
from shoal.node.run.founding import new_manifest
from shoal.node.run.kept_manifests import asked_otherwise, keep_manifest
from shoal.node.run.manifest import Manifest, read_signed, sign
from shoal.node.sketches.sketch_choice import within_budget
from shoal.protocol.identity import Identity
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(logs, "configure", lambda **_: None)


def test_found_makes_a_manifest_of_the_preset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append((config, manifest)) or 0)
    assert cli.main(["found", "--name", "my-run", "--steps", "40", "--role", "composer", "--lease-seconds", "5"]) == 0
    config, manifest = seen[0]
    assert manifest.ownership.lease_seconds == 5
    assert (config.role, config.invite) == ("composer", None)
    assert (manifest.name, manifest.train.steps, manifest.train.warmup_steps) == ("my-run", 40, 4)
    assert manifest.model.config["model_type"] == "qwen3_moe"
    assert manifest.founder.startswith("12D3KooW")
    assert cli.main(["found"]) == 0
    again = seen[1][1]
    assert (again.name, again.founder, seen[1][0].role) == ("tiny", manifest.founder, "bootstrap")
    assert cli.main(["found", "--private-layers", "2"]) == 0
    assert [each.model.private_layers for _, each in seen] == [0, 0, 2]


def test_found_takes_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    config = preset("fine-grained").model.config | {"num_experts": 24, "use_cache": True, "architectures": ["X"]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert cli.main(["found", "--model", str(tmp_path), "--preset", "tiny", "--name", "mine"]) == 0
    assert cli.main(["found", "--model", str(file)]) == 0
    for manifest in seen:
        assert manifest.model.experts.num_experts == 24
        assert not {"use_cache", "architectures"} & manifest.model.config.keys()
        assert manifest.standin == preset("tiny").standin
        assert (manifest.train.optimizer, manifest.train.learning_rate) == ("adamw", 3e-3), (
            "muon's is for a preset's model"
        )
    for bad in (
        {"vocab_size": 100},
        {"vocab_size": None},
        {"max_position_embeddings": 8},
        {"max_position_embeddings": None},
        {"model_type": "llama"},
        {"num_experts": "many"},
    ):
        file.write_text(json.dumps(config | bad))
        assert cli.main(["found", "--model", str(file)]) == 2, bad
        assert "fix: " in capsys.readouterr().err
    for bad_text in ("[]", "{", "{}"):
        file.write_text(bad_text)
        assert cli.main(["found", "--model", str(file)]) == 2
    assert cli.main(["found", "--model", str(tmp_path / "nothing")]) == 2
    file.write_text(json.dumps(config))
    assert cli.main(["found", "--model", str(file), "--seed", str(tmp_path)]) == 2
    assert len(seen) == 2


def test_paths_may_begin_at_home_where_no_shell_says_where_that_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[tuple[PeerConfig, Manifest]] = []
    monkeypatch.setattr(cli, "_start", lambda *told: seen.append(told) or 0)
    (tmp_path / "peer.toml").write_text('http_port = 8470\nmodel = "~/m"\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(preset("fine-grained").model.config))
    for argv, variable in ((["--config=~/peer.toml"], {}), ([], {"SHOAL_CONFIG": "~/peer.toml"})):
        for name, value in variable.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["found", *argv]) == 0, capsys.readouterr().err
        assert seen[-1][0].http_port == 8470
        assert seen[-1][1].model.experts.num_experts == 64
    monkeypatch.delenv("SHOAL_CONFIG")
    assert cli.main(["found", "--seed=~/nothing"]) == 2
    assert f"{tmp_path}/nothing is no checkpoint" in capsys.readouterr().err


def test_what_a_config_says_is_null_is_no_familys_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
        "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 0,
    }  # fmt: skip
    config = AutoConfig.for_model("deepseek_v2", **sizes, q_lora_rank=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for option in ("--model", "--seed"):
        assert cli.main(["found", option, str(tmp_path)]) == 0
        assert "model.layers.0.self_attn.q_proj.weight" in backbone_shapes(seen[-1].model)
        assert seen[-1].model.config["eos_token_id"] is None


def test_found_refuses_a_model_whose_router_has_classes_beside_the_experts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "_start", lambda *_: pytest.fail("it was founded"))
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts": 4, "router_hidden_size": 16,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("zaya", **sizes)).save_pretrained(tmp_path)
    for option in ("--model", "--seed"):
        capsys.readouterr()
        assert cli.main(["found", option, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "its router has [5] classes" in said
        assert "fix: take " in said


def test_found_compares_the_models_positions_with_what_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(preset("tiny").model.config | {"max_position_embeddings": 128}))
    assert cli.main(["found", "--model", str(file)]) == 2
    assert "--set data.context_length=128" in capsys.readouterr().err
    assert cli.main(["found", "--model", str(file), "--set", "data.context_length=128"]) == 0
    assert seen[0].data.context_length == 128
    assert cli.main(["found", "--model", str(file), "--set", "data.context_length=129"]) == 2


@pytest.mark.parametrize(("vocabulary", "says"), [(300, "no tokenizer.json"), (200, "no tokenizer.json"), (256, "")])
def test_a_seed_whose_tokens_nobody_knows_is_refused(
    vocabulary: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    config = dict(preset("tiny").model.config) | {"vocab_size": vocabulary}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(tmp_path / "moe")
    capsys.readouterr()
    assert cli.main(["found", "--seed", str(tmp_path / "moe")]) == (2 if says else 0)
    assert says in capsys.readouterr().err
    assert [manifest.data.tokenizer for manifest in seen] == ([] if says else ["bytes"])


@pytest.mark.parametrize(("added", "says"), [(44, ""), (45, "has 301 tokens"), (-1, "tokenizer.json is none")])
def test_a_seed_with_a_tokenizer_of_another_model_is_refused(
    added: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    config = dict(preset("tiny").model.config) | {"vocab_size": 300}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(tmp_path / "moe")
    tokenizer = byte_tokenizer(64).backend_tokenizer
    tokenizer.add_tokens([f"<word {number}>" for number in range(added)])
    (tmp_path / "moe/tokenizer.json").write_text(tokenizer.to_str() if added >= 0 else "{nope")
    capsys.readouterr()
    assert cli.main(["found", "--seed", str(tmp_path / "moe")]) == (2 if says else 0)
    assert says in capsys.readouterr().err
    assert [manifest.data.tokenizer for manifest in seen] == ([] if says else ["seed"])


def test_found_chooses_sketches_by_what_may_be_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest.sketch) or 0)
    assert cli.main(["found", "--sketch-budget", "200000"]) == 0
    assert (seen[-1].kind, seen[-1].budget_bytes) == ("rows", 200_000)
    assert cli.main(["found", "--sketch-budget", "10000"]) == 0  # of 430 kB
    assert (seen[-1].kind, seen[-1].codec, seen[-1].budget_bytes) == ("rows", "int4", 10_000)
    assert cli.main(["found", "--sketch-budget", "3000"]) == 0
    assert (seen[-1].kind, seen[-1].rank, seen[-1].gradient_every, seen[-1].budget_bytes) == ("gradient", 4, 58, 0)
    assert cli.main(["found", "--sketch-budget", "3000", "--set", "sketch.rank=8"]) == 0
    assert (seen[-1].kind, seen[-1].rank) == ("gradient", 8)
    assert cli.main(["found", "--sketch-budget", "3000", "--set", "standin.kind=narrow"]) == 0
    assert (seen[-1].kind, seen[-1].budget_bytes) == ("rows", 3_000)
    assert cli.main(["found", "--sketch-budget", "10"]) == 2
    err = capsys.readouterr().err
    assert "rank 4 need" in err
    assert "--sketch-budget" in err


def biased_checkpoint(folder: Path) -> None:
    """Of another size than the presets, with routers that select by more than their scores."""
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 4, "intermediate_size": 24, "moe_intermediate_size": 24, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "first_k_dense_replace": 0,
    }  # fmt: skip
    config = AutoConfig.for_model("glm4_moe", **sizes, eos_token_id=None, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_a_budget_is_spent_on_the_checkpoints_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    biased_checkpoint(tmp_path)
    assert cli.main(["found", "--seed", str(tmp_path), "--sketch-budget", "4000"]) == 0
    (manifest,) = seen
    unchosen = msgspec.structs.replace(manifest, sketch=preset("tiny").sketch)
    assert manifest.sketch == within_budget(unchosen, 4000).sketch


def test_a_bias_rate_needs_the_checkpoints_routers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    biased_checkpoint(tmp_path)
    assert cli.main(["found", "--seed", str(tmp_path), "--set", "train.bias_rate=0.001"]) == 0, capsys.readouterr().err
    assert [manifest.train.bias_rate for manifest in seen] == [0.001]


def test_a_run_goes_on_without_what_it_was_founded_from(tmp_path: Path) -> None:
    """Its founder is restarted by the same command, which names a folder that is gone by now."""
    config = PeerConfig(data_dir=tmp_path / "founder")
    first = new_manifest(config, "tiny", name="mine", steps=50, lease_seconds=5.0)
    run = read_signed(sign(Identity.load_or_create(config.identity_path), first))
    keep_manifest(config.data_dir, run.run_id, run.signed)
    gone = tmp_path / "gone"
    again = new_manifest(config, "tiny", name="mine", steps=50, lease_seconds=5.0, seed=gone)
    assert again == first
    assert new_manifest(config, "tiny", name="mine", model=gone) == first, "what is not named is as it was"
    other = new_manifest(config, "tiny", name="mine", steps=60, min_composers=3, settings=["sketch.kappa=0.5"])
    assert set(asked_otherwise(first, other)) == {"train.steps", "train.min_composers", "sketch.kappa"}
    with pytest.raises(ConfigError, match="no checkpoint"):
        new_manifest(config, "tiny", name="another", seed=gone)


def test_a_preset_is_not_for_longer_texts_than_its_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["found", "--set", "data.context_length=512"]) == 2
    assert "256 positions" in capsys.readouterr().err


def test_facts_that_cannot_be_together_are_asked_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["found", "--set", "sketch.kind=gradient", "--set", "sketch.rank=100000"]) == 2
    assert "sketch.rank 100000 is more than 64" in capsys.readouterr().err
