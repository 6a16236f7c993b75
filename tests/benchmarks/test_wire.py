"""`./dev bench wire`: what it counts for a step, and the whole of it once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from shoal.benchmarks.step import of_preset
from shoal.benchmarks.wire import backbone_parts, main, sign_sketches, sketch_rows, standin_deltas
from shoal.node.run.manifest import Manifest, with_settings

HIDDEN, LAYERS, EXPERTS, TOP_K, WIDTH = 64, 3, 16, 2, 64


def tiny(*settings: str) -> Manifest:
    return with_settings(of_preset("tiny"), settings)


def test_numbers_of_a_step() -> None:
    rows = sketch_rows(tiny("data.context_length=64", "train.batch_size=2"))
    assert [work.made_a_step for work in rows] == [0.0, 0.0, 2 * HIDDEN * 128 * TOP_K * LAYERS * 7 / 8]
    assert [work.numbers for work in rows] == [2 * HIDDEN * 128 * TOP_K // EXPERTS] * 3
    assert all(work.made_a_step == 0.0 for work in sketch_rows(tiny("sketch.kind=none")))

    copies, ternary = standin_deltas(tiny("standin.publish_every=4"))
    everything = 3 * HIDDEN * WIDTH * LAYERS * EXPERTS / 4
    assert (copies.made_a_step, copies.read_a_step) == (everything / 8, everything * 7 / 8)
    assert ternary.made_a_step == ternary.read_a_step == 0.0

    every, seldom = (backbone_parts(tiny(f"outer.every_steps={steps}")) for steps in (1, 8))
    assert {work.name for work in every if work.made_a_step} == {"backbone, float16"}
    assert sum(work.made_a_step for work in every) == 8 * sum(work.made_a_step for work in seldom)


def test_signs_are_made_once_in_an_interval_and_read_in_every_step() -> None:
    assert [work.made_a_step for work in sign_sketches(tiny())] == [0.0]
    [work] = sign_sketches(tiny("sketch.kind=signs", "sketch.gradient_every=8"))
    others = 3 * HIDDEN * WIDTH * LAYERS * EXPERTS * 7 / 8
    assert (work.made_a_step, work.read_a_step) == (others / 8, others)
    assert work.nbytes == 3 * WIDTH * (HIDDEN / 8 + 2) + 16


def test_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--preset", "tiny", "--seconds", "0", "--step-ms", "50", "--json", str(tmp_path / "wire.json")]
    monkeypatch.setattr(sys, "argv", ["wire", *said])
    main()
    found = {one["name"]: one for one in json.loads((tmp_path / "wire.json").read_text())}
    assert len(found) == len(capsys.readouterr().out.strip().splitlines()) - 4
    assert all(one[way] > 0 for one in found.values() for way in ("made", "read", "copied"))
    assert found["whole experts, float32"]["bytes_per_number"] == pytest.approx(4, abs=1e-3)
    assert found["row sketches, int4"]["share"] > 0
    assert found["whole experts, nf4"]["share"] is None
