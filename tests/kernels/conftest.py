"""What all tests of kernels share."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """New inputs on every run; a failure prints the seed that repeats it."""
    value = random.SystemRandom().randrange(1 << 32)
    print(f"seed {value}")
    with torch.random.fork_rng():
        torch.manual_seed(value)
        random.seed(value)
        yield value
