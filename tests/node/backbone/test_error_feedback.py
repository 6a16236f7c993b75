"""What a coarse codec keeps from one round is sent with the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoal.node.learning.composer import Composer
from shoal.protocol.averaging.merging import Facts
from shoal.protocol.averaging.parts import PartCodec
from tiny import composer_of, manifest_of
from torch import Tensor


def taught(composer: Composer, index: int) -> None:
    """As if it had learned something: every fragment moves somewhere."""
    for name in composer.fragments[index].names:
        weights = composer.backbone[name]
        with torch.no_grad():
            weights += 1e-3 * torch.randn_like(weights)
    composer.step += 1
    composer.tokens += 10


def one_round(composer: Composer, index: int) -> tuple[Tensor, Tensor]:
    """(what it learned since the last commit, what the swarm got of it); alone, so that its own part is the average."""
    spec = composer.manifest.outer
    learned = composer.common[index] - composer.local_fragment(index)
    entry = composer.begin_round(index)
    received = PartCodec(spec.codec).as_received(entry.vector)
    before = composer.common[index]
    facts = [Facts("a", entry.tokens, entry.steps, entry.norms)]
    composer.commit_round(index, *composer.propose(index, received, facts))
    return learned, before - composer.common[index]


def composer(**outer: Any) -> Composer:
    return composer_of(manifest_of(outer=outer), owned=())


@pytest.mark.parametrize("merge", ["mean", "radial"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_over_many_rounds_the_swarm_gets_all_that_was_learned(codec: str, merge: str) -> None:
    """Without feedback the errors would add up like a random walk; with it the sum is off by the last error only."""
    it, index = composer(codec=codec, merge=merge), 0
    learned, got, errors = torch.zeros(()), torch.zeros(()), []
    for _ in range(12):
        taught(it, index)
        mine, theirs = one_round(it, index)
        learned, got = learned + mine, got + theirs
        errors.append(float((mine - theirs).norm()))
    kept = it.lost[index]
    torch.testing.assert_close(got + kept, learned, rtol=0, atol=1e-6)
    assert 0 < float(kept.norm()) < 2 * max(errors)
    assert float((learned - got).norm()) < 0.5 * sum(errors)


def test_nothing_is_kept_where_the_codec_is_fine_or_the_round_failed() -> None:
    fine = composer(codec="float16")
    taught(fine, 0)
    one_round(fine, 0)
    assert not fine.lost
    coarse = composer(codec="int4")
    taught(coarse, 0)
    coarse.begin_round(0)
    coarse.abandon_round(0)
    assert not coarse.lost
    one_round(coarse, 0)
    assert coarse.lost
    coarse.reset_fragment(0, coarse.common[0].clone(), coarse.momentum[0].clone())
    assert not coarse.lost
