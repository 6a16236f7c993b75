"""`./dev bench savings`: what it counts, against what can be worked out, and the whole of it once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from shoal.benchmarks.savings import Saving, Texts, main, manifest_of, markdown, measure, train_seed
from shoal.node.run.manifest import Manifest, with_settings

HIDDEN, LAYERS, TOP_K, WIDTH = 128, 3, 2, 64
PER_PAIR = 3 * 2 * HIDDEN * WIDTH * LAYERS  # FLOPs of an expert's forward on one row, in all layers


def small(*settings: str, steps: int = 2) -> Manifest:
    manifest = manifest_of(experts=4, top_k=TOP_K, width=WIDTH, steps=steps)
    return with_settings(manifest, ["data.context_length=64", "train.batch_size=1", *settings])


def saving(text: str) -> Saving:
    return measure(text, small(), Texts(small(), composers=2, windows=2), composers=2, workers=1, seed=None)


def test_what_stand_ins_save() -> None:
    """Of an expert's three products (forward, to inputs, to weights) a copy takes two, a narrow one a part of two."""
    full = saving("centralized")
    copies = saving("workers:standin.kind=lowbit:sketch.kind=rows")
    narrow = saving("workers:standin.kind=narrow:standin.width_fraction=0.25:sketch.kind=rows")
    experts = TOP_K * PER_PAIR
    assert full.composer_flops - copies.composer_flops == pytest.approx(experts, rel=0.01)
    assert copies.composer_flops - narrow.composer_flops == pytest.approx(2 * 0.75 * experts, rel=0.01)
    assert copies.worker_flops > 2 * experts, "its experts' forward and backward, for all composers"
    assert full.worker_flops == 0.0
    assert full.accuracy == 1.0
    assert 0.5 < narrow.accuracy < 1.5


def test_everybody_goes_on_from_the_seed() -> None:
    texts = Texts(small(), composers=2, windows=2)
    seed = train_seed(small("train.warmup_steps=0", steps=8), texts, steps=8)
    still = small("train.learning_rate=1e-12", steps=10)
    whole = measure("centralized", still, texts, composers=2, workers=1, seed=seed)
    split = measure("shoal:standin.kind=narrow", still, texts, composers=2, workers=1, seed=seed)
    assert whole.loss == pytest.approx(split.loss, rel=1e-4), "nobody learned, and all began with the same"
    assert whole.loss < saving("centralized").loss - 0.1, "it has learned before"


def test_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--experts", "4", "--top-k", "1", "--width", "16", "--steps", "1", "--composers", "2", "--windows", "1"]
    methods = ["--methods", "centralized,shoal:standin.kind=lowbit", "--set", "data.context_length=32"]
    monkeypatch.setattr(sys, "argv", ["savings", *size, *methods, "--out", str(tmp_path)])
    main()
    found = [Saving(**each) for each in json.loads((tmp_path / "savings.json").read_text())]
    assert (tmp_path / "savings.md").read_text() == markdown(found) + "\n"
    assert found[0].composer_flops > found[1].composer_flops


def test_who_is_nobody() -> None:
    with pytest.raises(ValueError, match="neither"):
        saving("everybody")
