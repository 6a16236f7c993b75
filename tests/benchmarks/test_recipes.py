"""`./dev bench recipes` compares what it says: equal weights and work, and loads that are counted right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shoal.benchmarks.recipes import RECIPES, held_out, loads, manifest_of, train, weights_of
from shoal.node.errors import ConfigError
from shoal.node.learning.evaluate import heldout_loss
from shoal.node.model.build import build_model
from shoal.node.model.init import expert_shape


def test_all_recipes_have_the_same_weights_and_work() -> None:
    sizes = [weights_of(manifest_of(recipe, 10)) for recipe in RECIPES.split(",")]
    for kind in zip(*sizes, strict=True):  # what differs is routers, and gates of shared experts
        assert max(kind) < 1.04 * min(kind)


def test_weights_are_those_of_the_model() -> None:
    manifest = manifest_of("fine-grained+shared", 10)
    slots = expert_shape(manifest.model).num_experts
    model = build_model(manifest.model, owned=range(slots), standin=manifest.standin)
    whole = sum(parameter.numel() for parameter in model.network.parameters())
    assert weights_of(manifest)[0] == whole


def test_loads() -> None:
    counts = torch.tensor([[100, 100, 100, 100], [397, 0, 3, 0]])
    heaviest, dead = loads(counts)
    assert heaviest == pytest.approx((1 + 3.97) / 2)
    assert dead == pytest.approx(2 / 8)


@pytest.mark.parametrize("composers", [1, 2])
def test_a_recipe_is_trained_and_measured(composers: int) -> None:
    manifest = manifest_of("standard+softmax-first:train.batch_size=2", 4)
    losses: list[float] = []
    model = train(manifest, composers, 0, lambda step, loss: losses.append(loss))
    assert len(losses) == 4
    windows = torch.randint(256, (20, 32))
    loss, counts = held_out(model, windows)
    assert loss == pytest.approx(heldout_loss(model, windows), rel=1e-6)
    assert counts.sum(1).tolist() == [20 * 32 * 2] * 3


@pytest.mark.parametrize("bad", ["huge", "standard+wide", "standard:train.balance=0", "standard:train.z_coef=-1"])
def test_other_recipes_are_refused(bad: str) -> None:
    with pytest.raises((ValueError, ConfigError)):
        manifest_of(bad, 10)


def test_from_the_command_line_to_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.benchmarks.recipes", "--steps", "3", "--windows", "2", "--seeds", "2"]
    command += ["--recipes", "standard,fine-grained+sigmoid:train.bias_rate=0.001", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=800, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recipes.md").read_text() in done.stdout
    outcomes = json.loads((tmp_path / "recipes.json").read_text())
    assert [one["seed"] for one in outcomes] == [0, 0, 1, 1]
    assert done.stdout.count("| `") == 2
