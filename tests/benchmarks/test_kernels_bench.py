"""The kernel benchmark runs, and reports numbers that can be numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shoal.benchmarks.layer import THEIRS
from shoal.benchmarks.timing import interleaved
from shoal.kernels.standin import KINDS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    done = subprocess.run(
        [sys.executable, "-m", "shoal.benchmarks.kernels", "--quick", "--out", out],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_ratio_and_time_is_a_positive_number(run: tuple[str, dict]) -> None:
    _, report = run
    of_machine = {"python", "torch", "machine", "threads", "device", "dtype", "seed"}
    assert set(report) == of_machine | {"experts", "standins", "sketches"}
    (experts,) = report["experts"]
    assert set(experts["shape"]) == {"tokens", "hidden", "width", "experts", "top_k"}
    assert set(experts["milliseconds"]) == {"owned", "dense", "square", *THEIRS, *KINDS}
    assert set(experts["ratios"]) == {"dense", *THEIRS, *KINDS}
    assert experts["rounds"] >= 5
    assert 0 < experts["of_ceiling"] < 2  # a neighbour may take the core during either
    for standin in report["standins"]:
        assert set(standin["milliseconds"]) == {"initial", "refit", "delta", "fidelity", "apply", "dense"}
    for sketch in report["sketches"]:
        assert set(sketch["milliseconds"]) == {"form", "add", "rebuild"}
    timed = (experts, *report["standins"], *report["sketches"])
    numbers = [experts["ratios"], *(part["milliseconds"] for part in timed)]
    assert all(math.isfinite(value) and value > 0 for part in numbers for value in part.values())


def test_stand_ins_are_smaller_than_their_expert_and_deltas_smaller_than_snapshots(run: tuple[str, dict]) -> None:
    _, report = run
    assert [standin["kind"] for standin in report["standins"]] == list(KINDS)
    for standin in report["standins"]:
        assert standin["expert_bytes"] == 4 * 3 * standin["hidden"] * standin["width"]
        assert 0 < standin["delta_bytes"] < standin["snapshot_bytes"] < standin["expert_bytes"]


def test_sketches_are_smaller_than_the_gradient_and_no_better_than_the_best_of_their_rank(
    run: tuple[str, dict],
) -> None:
    _, report = run
    assert [sketch["rank"] for sketch in report["sketches"]] == [4, 16]
    for sketch in report["sketches"]:
        assert 0 < sketch["sketch_numel"] < sketch["gradient_numel"]
        assert 0 < sketch["best_error"] < sketch["error"] < 1


def test_the_tables_name_what_was_measured_and_how_to_read_it(run: tuple[str, dict]) -> None:
    printed, report = run
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 + len(report["experts"]) + len(report["standins"]) + len(report["sketches"])
    assert "Ratios are medians of each round's ratio" in printed


def test_interleaving_keeps_rounds_in_step_and_drops_the_first() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, least=4)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in times.values()] == [4, 4]
