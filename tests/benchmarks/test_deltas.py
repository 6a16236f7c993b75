"""Deltas that say less than everything: what they leave out comes with later ones."""

from __future__ import annotations

import pytest
import torch
from shoal.benchmarks.deltas import LowRankPublisher, PartialCopy
from shoal.benchmarks.fidelity import STUDIES
from shoal.kernels.experts import DenseExpert
from shoal.kernels.lowbit import LowbitStandIn
from shoal.kernels.replay import ReplayBuffer

D, F = 24, 40


def expert_near(expert: DenseExpert | None, moved: float) -> DenseExpert:
    """Another expert whose weights are `moved` of their size away."""
    gate_up, down = (torch.randn(2 * F, D) * 0.05, torch.randn(D, F) * 0.05) if expert is None else expert.dense()
    return DenseExpert(gate_up + moved * 0.05 * torch.randn_like(gate_up), down + moved * 0.05 * torch.randn_like(down))


@pytest.mark.parametrize(("share", "levels"), [(0.1, 16), (1.0, 1), (0.3, 1)])
def test_partial_deltas_towards_one_expert_end_at_its_copy(share, levels):
    start = expert_near(None, 0)
    target = expert_near(start, 1.0)
    partial = PartialCopy(LowbitStandIn.of(*start.dense()).tensors)
    partial.share, partial.levels = share, levels
    follower = LowbitStandIn(partial.tensors)
    errors, sizes = [], []
    for _ in range(40):
        delta = partial.delta(partial.payload_to(*target.dense()))
        follower.apply(delta)
        sizes.append(len(delta))
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(partial.dense(), target.dense(), strict=True)))
    assert follower.digest() == partial.digest()  # they are deltas as anybody's
    assert errors == sorted(errors, reverse=True)
    exact = LowbitStandIn.of(*start.dense())
    whole = exact.delta(exact.payload_to(*target.dense()))
    for reached, wanted in zip(partial.dense(), exact.dense(), strict=True):
        assert torch.equal(reached, wanted)
    assert sizes[0] < len(whole)


def test_a_low_rank_correction_is_of_the_last_exact_copy():
    start = expert_near(None, 0)
    publisher = LowRankPublisher(
        LowbitStandIn.of(*start.dense()), ReplayBuffer(8, D), act="silu", rank=2, exact_every=3
    )
    u, v = torch.randn(2 * F, 1) * 0.2, torch.randn(1, D) * 0.2
    gate_up, down = start.dense()
    moved = DenseExpert(gate_up + u @ v, down)
    publisher.delta(start)
    after_exact = publisher.fidelity(moved)
    publisher.delta(moved)
    assert publisher.fidelity(moved) > max(0.8, after_exact + 0.1)  # one direction is what had changed
    publisher.delta(start)
    assert publisher.fidelity(moved) < after_exact + 0.05  # replaced, not added to
    publisher.delta(moved)
    assert publisher.published.digest() != LowbitStandIn.of(*start.dense()).digest()


def test_every_setting_publishes_at_the_end_of_its_cycle():
    for study in STUDIES.values():
        assert all(study.cycle % setting.every == 0 for setting in study.settings.values())
        assert max(study.ages) < study.cycle
