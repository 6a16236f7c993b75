"""Fixtures of the swarm tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out, and the harness is beside the tests

from harness import Swarm


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """A swarm to be; whatever it starts must be gone at the end."""
    with Swarm(tmp_path) as swarm:
        yield swarm
