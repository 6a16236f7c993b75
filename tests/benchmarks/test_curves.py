"""Loss curves: what is drawn, and that it is."""

import random
from pathlib import Path

import pytest
from shoal.benchmarks.curves import draw, running_mean


def test_a_running_mean_is_that_of_the_last_values() -> None:
    values = [random.uniform(0.0, 5.0) for _ in range(40)]
    for window in (1, 7, 100):
        wanted = [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        assert running_mean(values, window) == pytest.approx(wanted)


def test_curves_of_several_seeds_become_a_picture(tmp_path: Path) -> None:
    curves = {name: [[5.0 / (step + 1) + random.random() for step in range(50)] for _ in range(3)] for name in "ab"}
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
