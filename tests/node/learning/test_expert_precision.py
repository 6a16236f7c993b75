"""Experts that compute in bfloat16, as they do on a GPU that multiplies a group's rows in one launch."""

from __future__ import annotations

import secrets

import pytest
import torch
from shoal.node.model import shard
from shoal.node.sketches.sketching import SketchCollector
from tiny import SLOTS, composer_of, manifest_of


@pytest.mark.parametrize("kind", ["lowbit", "narrow", "ternary"])
def test_a_composer_learns_what_it_learns_in_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = secrets.randbits(31)
    print(f"{seed=}")
    manifest = manifest_of(standin={"kind": kind}, outer={"every_steps": 4, "fragments": 2})
    exact, coarse = (composer_of(manifest, owned=range(0, SLOTS, 2), seed=seed) for _ in range(2))
    for composer, dtype in ((exact, None), (coarse, torch.bfloat16)):
        composer.collector = SketchCollector(manifest.sketch, composer.shape, seed=0)
        monkeypatch.setattr(shard, "fast_dtype", lambda _, dtype=dtype: dtype)
        losses = [composer.train_step().loss for _ in range(3)]
        if composer is exact:
            expected = losses
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses != expected  # it did compute otherwise
    for index in range(len(exact.fragments)):
        ours, theirs = exact.begin_round(index).vector, coarse.begin_round(index).vector
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.998
