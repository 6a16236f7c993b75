"""`./dev bench quality` understands its methods, and runs from the command line to a table."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shoal.benchmarks.quality import METHODS, Comparison, Method
from shoal.node.manifest import Manifest
from shoal.node.manifest_errors import ManifestError
from shoal.node.model.presets import preset


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
    with pytest.raises(ManifestError):
        Method.parse("lone:sketch.kapa=5", manifest())
    with pytest.raises(ManifestError):
        Method.parse("lone:sketch.kappa=-7", manifest())


def test_every_seed_has_its_own_weights_and_batches() -> None:
    one, other = (Comparison(manifest(), 2, 1, chance=chance) for chance in (0, 1))
    assert one.manifest.model.seed != other.manifest.model.seed
    drawn = [c.batches(index, 0).next() for c in (one, other) for index in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert torch.equal(one.heldout, other.heldout)


def test_the_command_trains_from_a_seed_and_writes_its_table(tmp_path: Path) -> None:
    methods = ["centralized", "spes", "shoal-lowbit+rows", "extreme-lowbit+rows:sketch.kappa=0"]
    command = [sys.executable, "-m", "shoal.benchmarks.quality", "--methods", ",".join(methods), "--out", str(tmp_path)]
    size = ["--preset", "tiny", "--composers", "2", "--workers", "3", "--windows", "2"]
    done = subprocess.run(
        [*command, *size, "--seed-steps", "1", "--steps", "2", "--set", "sketch.budget_bytes=5000"],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
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
    assert whole["state_bytes"] > spes["state_bytes"] > owners["state_bytes"] > none["state_bytes"]
    tokens, headers = 2 * 2 * 4 * 256, 24 * 16 * 3
    for name in methods[2:]:
        assert 0 < results[name]["sketch_bytes"] <= 2 * 2 * (5000 + headers)
        assert f"| {results[name]['sketch_bytes'] / tokens:.1f} |" in done.stdout
    assert whole["sketch_bytes"] == spes["sketch_bytes"] == 0
