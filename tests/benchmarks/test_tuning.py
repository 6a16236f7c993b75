"""Sweeps end where the loss is least, and say what they tried."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from shoal.benchmarks.comparison import Method
from shoal.benchmarks.tuning import FACTORS, FARTHEST, OUTER, table, tune
from shoal.node.model.presets import preset
from shoal.node.run.manifest import Manifest


def method(text: str) -> Method:
    return Method.parse(text, Manifest(name="bench", founder="none", created_at=0, model=preset("tiny").model))


def bowl(best: float, outer: float, tried: list[str], experts: float | None = None) -> Callable[[str], float]:
    """A loss that is least at `best` times the preset's rate, of experts at `experts` times it (by default, `best`),
    and `outer` more with another outer step."""

    def loss(text: str) -> float:
        tried.append(text)
        facts = method(text).manifest
        factor = facts.train.learning_rate / method("lone").manifest.train.learning_rate
        off = math.log2(factor / best), math.log2(factor * facts.train.expert_rate / (experts or best))
        return 2.0 + math.hypot(*off) / math.sqrt(2) + (outer if facts.outer.momentum else 0.0)

    return loss


@pytest.mark.parametrize("steps", range(-5, 6))
def test_the_best_rate_is_found_or_is_at_the_edge(steps: int) -> None:
    tried: list[str] = []
    best = 2.0 ** (steps + random.uniform(-0.4, 0.4))
    found = tune(method("lone"), bowl(best, 0.0, tried))
    assert found.factor == max(1 / FARTHEST, min(FARTHEST, 2.0**steps))
    assert found.best.startswith(f"lone:train.learning_rate={3e-3 * found.factor:g}")
    assert len(set(tried)) == len(tried) == len(found.rates) + len(found.apart) >= 7
    inside = min(found.rates) < found.factor < max(found.rates)
    assert inside == (abs(steps) < math.log2(FARTHEST))
    alike = method(found.best).manifest.train.expert_rate == 1.0
    assert alike == (abs(steps) <= math.log2(FARTHEST)), "best, where it can be reached"
    assert not found.outer, "nothing is merged"


@pytest.mark.parametrize("experts", [0.5, 2.0])
@pytest.mark.parametrize("best", [1.0, 4.0])
def test_experts_may_want_another_rate(best: float, experts: float) -> None:
    found = tune(method("spes"), bowl(best, 0.5, [], best * experts)).best
    facts = method(found).manifest.train
    assert facts.expert_rate == experts
    assert facts.learning_rate == 3e-3 * best


@pytest.mark.parametrize("name", ["diloco", "spes", "shoal-narrow+rows:standin.refit_steps=8"])
def test_methods_that_merge_try_other_outer_steps_at_the_best_rate(name: str) -> None:
    better = tune(method(name), bowl(2.0, -0.1, []))
    worse = tune(method(name), bowl(2.0, 0.1, []))
    assert better.best.startswith(worse.best + ":outer.")
    facts = method(better.best).manifest.outer
    assert (facts.learning_rate, facts.momentum) == OUTER[0]
    assert method(worse.best).manifest.outer == method(name).manifest.outer
    assert set(better.outer) == set(OUTER)


def test_what_diverges_is_never_the_best() -> None:
    found = tune(method("lone"), lambda text: math.nan if "0.006" in text else random.uniform(1.0, 2.0))
    assert found.rates[FACTORS[1]] == math.inf
    assert found.factor < FACTORS[1]


def test_the_table_has_every_cell_and_marks_the_best() -> None:
    sweeps = [tune(method("lone"), bowl(4.0, 0.0, [])), tune(method("diloco"), bowl(1.0, -0.5, []))]
    lines = table(sweeps).splitlines()
    apart = "experts x 2 | experts x 0.5 | backbone x 2 | backbone x 0.5"
    assert lines[0] == f"| method | x 0.5 | x 1 | x 2 | x 4 | x 8 | {apart} | best, outer 0.7 / 0.9 |"
    assert lines[2] == f"| lone |  | 4.0000 | 3.0000 | **2.0000** | 3.0000 |{' 2.7071 |' * 4}  |"
    assert lines[3] == f"| diloco | 3.0000 | 2.0000 | 3.0000 |  |  |{' 2.7071 |' * 4} **1.5000** |"
