"""Tests of islands share what two composers are compared by."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal.node.island.leader import Island

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def islands() -> Iterator[list[Island]]:
    """Those that a test makes; they are closed behind it."""
    made: list[Island] = []
    yield made
    for island in made:
        island.close()
