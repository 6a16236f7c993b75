"""`./dev bench surrogates`: what it computes by, against plain torch, and the whole of it once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from shoal.benchmarks.probe import Probe
from shoal.benchmarks.surrogates import BUDGETS, kinds, main, nothing, rank_correlation
from shoal.kernels.experts import run_expert
from shoal.node.learning.composer import Composer
from shoal.node.learning.data import Batches, load_corpus
from shoal.node.model.presets import preset
from shoal.node.run.manifest import Manifest


@pytest.fixture(scope="module")
def probe() -> Probe:
    parts = preset("tiny")
    model = msgspec.structs.replace(parts.model, config={**parts.model.config, "num_hidden_layers": 2})
    manifest = Manifest(name="probe", founder="none", created_at=0, model=model)
    text = load_corpus("stdlib")
    batches = Batches(text.shard(0, 1), 4, 64, seed=0)
    composer = Composer(manifest, owned=range(16), next_batch=batches.next)
    heldout = text.heldout(4, 64, seed=0)
    return Probe(composer.model, composer.shape.act, batches, heldout, rows=64, num_batches=4)


def test_experts_come_back_as_they_were(probe: Probe) -> None:
    before = {name: p.detach().clone() for name, p in probe.model.named_parameters()}
    expert = probe.model.shards[0].expert(3)
    zeros = nothing(0, expert, probe.fitting(0, 3))
    assert probe.loss_with({(0, 3): zeros, (1, 5): zeros}) != probe.exact
    assert probe.loss() == probe.exact
    for name, parameter in probe.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_nothing_has_no_output(probe: Probe) -> None:
    x_ND = torch.randn(5, 64)
    zeros = nothing(0, probe.model.shards[0].expert(0), probe.fitting(0, 0))
    assert not run_expert(x_ND, *zeros.dense()).any()
    assert probe.fidelity(0, 0, zeros) == 0.0
    errors = [probe.output_error(0, slot, zeros) for slot in range(16)]
    assert sum(errors) == pytest.approx(1.0), "what is missing adds up to all of the output's energy"


def test_the_correction_of_the_mean_is_the_best_of_its_rank(probe: Probe) -> None:
    make = kinds(probe.model, 1, probe.act)["shared, rank 32"]
    expert, rows = probe.model.shards[1].expert(2), probe.fitting(1, 2)
    near = make(1, expert, rows).dense()[1]
    best = torch.linalg.matrix_norm(near - expert.down.detach(), 2)
    mean = torch.stack([probe.model.shards[1].expert(slot).down.detach() for slot in range(16)]).mean(0)
    wanted = torch.linalg.svdvals(expert.down.detach() - mean)[32]
    assert wanted * 0.99 < best < wanted * 1.1, "Eckart and Young, but for int8 factors on a bfloat16 base"


def test_rank_correlation() -> None:
    xs = torch.rand(20).tolist()
    assert rank_correlation(xs, [x**3 for x in xs]) == pytest.approx(1.0)
    assert rank_correlation(xs, [-x for x in xs]) == pytest.approx(-1.0)


@pytest.mark.parametrize("model", [["--preset", "tiny"], ["--upcycled", "E16G1T2", "--dense-steps", "1"]])
def test_the_whole_of_it(model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--steps", "1", "--fit-steps", "1", "--windows", "1", "--singles", "1", "--rows", "64"]
    monkeypatch.setattr(sys, "argv", ["surrogates", *model, "--out", str(tmp_path), *small])
    main()
    table = (tmp_path / "surrogates.md").read_text()
    found = json.loads((tmp_path / "surrogates.json").read_text())
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    assert kinds["experts themselves"]["fidelity"] == 1.0
    assert kinds["narrow f/4"]["flops"] == 0.25
    assert kinds["4-bit copy"]["fidelity"] > kinds["ternary copy"]["fidelity"] > kinds["nothing"]["fidelity"] == 0.0
    assert all(f"| {kind} |" in table for kind in kinds)
    assert len(found["singles"]) == 4 * 3  # kinds, layers
    if "--upcycled" in model:  # copies are hardly apart yet: one base is nearly all of them
        assert kinds["shared, rank 8"]["fidelity"] > 0.95
    for budget in BUDGETS:
        found_within = kinds["chosen: {:g} bytes a weight, {:.0%} of FLOPs".format(*budget)]
        assert found_within["flops"] <= budget[1] * (1 + 1e-6)


def test_what_is_no_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["surrogates", "--upcycled", "dense"])
    with pytest.raises(ValueError, match="no form"):
        main()
