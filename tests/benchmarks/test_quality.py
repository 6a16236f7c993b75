"""`./dev bench quality` understands its methods, and runs from the command line to a table."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shoal.benchmarks.comparison import Comparison, Method
from shoal.benchmarks.quality import METHODS, main
from shoal.node.errors import ConfigError
from shoal.node.model.presets import preset
from shoal.node.run.manifest import Manifest, with_settings


def manifest() -> Manifest:
    return Manifest(name="bench", founder="none", created_at=0, model=preset("tiny").model)


@pytest.mark.parametrize("name", METHODS)
def test_the_default_methods_exist(name: str) -> None:
    assert Method.parse(name, manifest()).name == name


def test_a_method_says_what_differs_from_the_manifest() -> None:
    plain = Method.parse("shoal-lowbit", manifest())
    assert (plain.manifest.standin.kind, plain.manifest.sketch.kind, plain.extreme) == ("lowbit", "none", False)
    corrected = Method.parse("extreme-narrow+rows:sketch.kappa=5:sketch.codec=float16", manifest())
    assert corrected.extreme
    assert corrected.manifest.standin.kind == "narrow"
    sketch = corrected.manifest.sketch
    assert (sketch.kind, sketch.kappa, sketch.codec) == ("rows", 5.0, "float16")
    ternary = Method.parse("shoal-ternary+gradient", manifest()).manifest
    assert (ternary.train.expert_weights, ternary.sketch.kind) == ("ternary", "gradient")
    low_rank = Method.parse("shoal-lowbit+rows@lora4:sketch.kappa=5", manifest())
    assert (low_rank.mode.mode, low_rank.mode.rank, low_rank.manifest.sketch.kind) == ("lora", 4, "rows")
    assert Method.parse("extreme-lowbit@frozen", manifest()).mode.mode == "frozen"
    assert Method.parse("lone", manifest()).manifest == manifest()


@pytest.mark.parametrize("name", ["shoal", "shoal-wide", "shoal-lowbit+words", "lone+rows", "extreme-", ""])
def test_other_methods_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no method"):
        Method.parse(name, manifest())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError):
        Method.parse("lone:sketch.kapa=5", manifest())
    with pytest.raises(ConfigError):
        Method.parse("lone:sketch.kappa=-7", manifest())


def test_every_seed_has_its_own_weights_and_batches() -> None:
    one, other = (Comparison(manifest(), 2, 1, chance=chance) for chance in (0, 1))
    assert one.manifest.model.seed != other.manifest.model.seed
    drawn = [c.batches(index, 0).next() for c in (one, other) for index in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert torch.equal(one.heldout, other.heldout)


def test_a_key_names_what_a_result_follows_from() -> None:
    def key(text: str, *settings: str, composers: int = 2, chance: int = 0) -> str:
        return Comparison(with_settings(manifest(), settings), composers, 1, chance=chance).key(text)

    apart = [
        *(key("diloco", setting) for setting in ("outer.every_steps=9", "train.steps=7", "model.seed=3")),
        *(key(text) for text in ("diloco", "spes", "lone", "centralized", "shoal-lowbit", "shoal-lowbit@lora")),
        *(key("diloco", composers=3), key("lone", composers=3), key("lone", chance=1)),
    ]
    assert len(set(apart)) == len(apart)
    assert key("diloco:outer.every_steps=9") == key("diloco", "outer.every_steps=9")
    assert key("lone", "outer.every_steps=9", "sketch.kappa=3") == key("lone"), "which merges nothing"


def test_a_common_start_is_trained_once_and_kept(tmp_path: Path) -> None:
    def made(*settings: str, folder: Path | None = tmp_path) -> Comparison:
        facts = with_settings(manifest(), ["train.steps=3", "train.batch_size=1", "data.context_length=16", *settings])
        return Comparison(facts, 2, 1, seed_steps=2, folder=folder)

    def losses(comparison: Comparison) -> tuple[list[float], float]:
        seeding: list[float] = []
        comparison.seed(lambda step, loss: seeding.append(loss))
        return seeding, comparison.run("shoal-lowbit+rows", lambda step, loss: None, costs=False).loss

    first, again, anew, other = made(), made("sketch.kappa=3"), made(folder=None), made("train.learning_rate=0.01")
    (trained, found), (none, with_kappa), (trained_anew, found_anew) = map(losses, (first, again, anew))
    assert len(trained) == 2
    assert trained_anew == trained
    assert none == [], "other sketches start from the same"
    assert found == found_anew
    assert losses(made()) == ([], found)
    assert with_kappa != found
    text = "lone:train.learning_rate=0.003"
    assert first.key(text) == again.key(text) != other.key(text), "which starts from something else"
    assert len(losses(other)[0]) == 2


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command in this process, which has imported what takes seconds; returns what it prints."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quality", *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


SIZE = ("--preset", "tiny", "--composers", "2", "--windows", "2")


def test_the_command_trains_from_a_seed_and_writes_its_table(tmp_path: Path, run: Callable[..., str]) -> None:
    methods = ["centralized", "spes", "shoal-lowbit+rows", "extreme-lowbit+rows:sketch.kappa=0"]
    start = ["--workers", "3", "--seed-steps", "1", "--steps", "2", "--set", "sketch.budget_bytes=5000"]
    done = run(*SIZE, *start, "--methods", ",".join(methods), "--out", str(tmp_path))
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert list(curves) == methods
    assert all([len(seed) for seed in seeds] == [2] for seeds in curves.values())
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "quality.json").read_text())
    assert [(result["seed"], result["method"]) for result in told] == [(0, method) for method in methods]
    assert all(2.0 < result["loss"] < 6.0 for result in told)
    results = {result["method"]: result for result in told}
    whole, spes, owners, none = (results[name] for name in methods)
    assert whole["flops_per_token"] > spes["flops_per_token"] > none["flops_per_token"]
    for some in (spes, owners):
        assert whole["state_bytes"] > some["state_bytes"] > none["state_bytes"]
    assert all(r["peak_bytes"] > r["state_bytes"] > r["expert_bytes"] > 0 for r in (whole, spes, owners))
    tokens, headers = 2 * 2 * 4 * 256, 24 * 16 * 3
    for name in methods[2:]:
        sent = results[name]["up"]["sketches"]
        assert 0 < sent <= 2 * 2 * (5000 + headers)
        assert results[name]["tokens"] == tokens
        assert f"| {sent / tokens:.1f} / {sent / tokens:.1f} |" in done
    assert whole["up"]["sketches"] == spes["up"]["sketches"] == 0
    assert results[methods[3]]["down"]["deltas"] == 2 * results[methods[3]]["up"]["deltas"], "both composers read each"


def test_sketches_of_an_interval_are_counted(tmp_path: Path, run: Callable[..., str]) -> None:
    methods = [f"shoal-lowbit+{kind}:sketch.gradient_every=2:sketch.rank=4" for kind in ("gradient", "signs")]
    run(*SIZE, "--steps", "2", "--methods", ",".join([*methods, "shoal-lowbit"]), "--out", str(tmp_path))
    gradient, signs, none = json.loads((tmp_path / "quality.json").read_text())
    for result in (gradient, signs):
        assert result["up"]["sketches"] > 0
        assert result["peak_bytes"] > result["state_bytes"]
        assert result["expert_bytes"] > none["expert_bytes"], "sums are there between steps"


def test_the_command_tunes_and_goes_on_where_it_was(tmp_path: Path, run: Callable[..., str]) -> None:
    words = [*SIZE, "--methods", "lone,spes", "--tune", "--tokens", "2049", "--out", str(tmp_path)]
    run(*words)
    sweep = (tmp_path / "tuning.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in sweep[2:]] == ["| lone", "| spes"]
    assert all(line.count("**") == 2 for line in sweep[2:])
    told = json.loads((tmp_path / "quality.json").read_text())
    assert [(r["method"].split(":")[0], r["tokens"]) for r in told] == [("lone", 2 * 1024), ("spes", 2 * 2 * 1024)]
    cells = (tmp_path / "cells.jsonl").read_text()
    assert len(cells.splitlines()) >= 2 * 3 + 1 + 2
    again = run(*words)
    assert (tmp_path / "cells.jsonl").read_text() == cells
    assert again == (tmp_path / "tuning.md").read_text() + (tmp_path / "quality.md").read_text()


def test_the_command_varies_one_thing(
    tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--methods", "lone,diloco", "--steps", "2", "--first-seed", "3", "--vary", "outer.every_steps=1,2")
    lines = run(*SIZE, *words, "--out", str(tmp_path)).splitlines()[-4:]
    assert lines[0] == "| method | outer.every_steps 1 | outer.every_steps 2 |"
    assert lines[2].count("(+0.0%)") == 2
    cells = [json.loads(line)["result"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [cell["seed"] for cell in cells] == [3, 3, 3], "lone is the same at both"
    with pytest.raises(SystemExit, match="2"):
        run("--vary", "outer.every=1")
    assert "no fact of a manifest" in capsys.readouterr().err


def test_a_quick_look(tmp_path: Path) -> None:
    words = ["--quick", "--methods", "lone,shoal-narrow+rows", "--out", str(tmp_path)]
    command = [sys.executable, "-P", "-m", "shoal.benchmarks.quality", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    lone, swarm = json.loads((tmp_path / "quality.json").read_text())
    assert swarm["tokens"] == 2 * lone["tokens"] == 2 * 12 * 1024
    assert max(lone["loss"], swarm["loss"]) < 4.8, "from 5.5 of a model that knows nothing"
    assert min(swarm["up"].values()) > 0
