"""The replay ring: latest rows, a split that never mixes, no bad rows."""

from __future__ import annotations

import random

import pytest
import torch
from shoal.kernels.replay import HOLD_OUT_EVERY, ReplayBuffer


def test_replay_keeps_the_latest_rows_and_never_mixes_the_held_out() -> None:
    buffer = ReplayBuffer(32, 2)
    held_out: set[float] = set()
    fitted: set[float] = set()
    count = 0
    for _ in range(30):
        num = random.randint(0, 20)
        numbers = torch.arange(count, count + num, dtype=torch.float32) % 256  # bfloat16 holds these
        x = torch.stack([numbers, torch.full((num,), float(count // 256))], dim=1)
        buffer.add(x, torch.arange(count, count + num).float())
        count += num
        fitted |= set(buffer.fitting_rows()[1].tolist())
        held_out |= set(buffer.held_out_rows()[1].tolist())
        assert sorted(buffer.all_rows()[1].tolist()) == list(range(max(0, count - 32), count))
        assert len(buffer) == min(count, 32)
        kept_x, kept_gate = buffer.all_rows()
        assert torch.equal(kept_x[:, 0], kept_gate % 256)
    assert not fitted & held_out
    assert all(number % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 for number in held_out)


def test_replay_takes_spaced_rows_of_a_batch_that_is_too_large() -> None:
    buffer = ReplayBuffer(9, 1)
    assert buffer.capacity == 16
    buffer.add(torch.zeros(160, 1), torch.arange(160).float())
    assert sorted(buffer.all_rows()[1].tolist()) == list(range(0, 160, 10))
    with pytest.raises(ValueError, match="at least one"):
        ReplayBuffer(0, 1)


def test_replay_leaves_out_what_is_not_finite() -> None:
    buffer = ReplayBuffer(8, 2)
    buffer.add(torch.tensor([[1.0, torch.nan], [2.0, 2.0], [3.0, 3.0]]), torch.tensor([1.0, torch.inf, 1.0]))
    assert buffer.all_rows()[0].tolist() == [[3.0, 3.0]]
