"""The benchmark of islands: what it measures is what is there."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from shoal.benchmarks.island import Measured, markdown

COMMAND = [sys.executable, "-m", "shoal.benchmarks.island", "--preset", "tiny", "--steps", "16", "--set",
           "train.batch_size=4", "--set", "data.context_length=64"]  # fmt: skip
TOKENS_A_STEP = 4 * 64


@pytest.mark.timeout(600)
def test_bytes_inside_an_island_are_those_that_its_processes_exchange() -> None:
    """Data parallel: weights to a member and gradients from it, four bytes a weight, in a step of two batches. Gloo's
    sum is one of halves, exchanged, of which the member's then goes to the leader: half as much again."""
    done = subprocess.run([*COMMAND, "--way", "data parallel, 2"], stdout=subprocess.PIPE, check=True, text=True)
    found = Measured(**json.loads(done.stdout.splitlines()[-1]))
    # embeddings and head, norms, attention, routers, experts: 3 layers of 16 of 3 matrices 64 x 64
    weights = 2 * 256 * 64 + 3 * 16 * 3 * 64 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 64 * 16 + 2 * 64 + 2 * 16) + 64
    least = 2 * 4 * weights / (2 * TOKENS_A_STEP)
    assert 1.25 * least <= found.bytes_per_token < 1.3 * least
    assert found.processes == 2
    assert found.cpu_seconds_per_token > 0
    assert found.leader_bytes > found.library_bytes > 0
    assert found.member_bytes > 0
    assert 2.0 < found.loss < 6.0


def test_ratios_are_of_each_round() -> None:
    speeds = [random.uniform(100, 200) for _ in range(3)]
    measured = [
        Measured(way, 2, speed * factor, 0.002, 10.0, 1 << 20, 2 << 20, member, 1.0)
        for speed in speeds
        for way, factor, member in (("one process", 1.0, 0), ("pipeline, 2", 1.5, 3 << 20))
    ]
    table = markdown(measured)
    assert "| pipeline, 2 | " in table
    assert "| 1.50 | 2.00 | 10 | 2 | 3 | 1.0000 |" in table
    assert "| 1.00 | 2.00 | 10 | 2 |  | 1.0000 |" in table
