"""Choosing forms within budgets, against every possible choice."""

from __future__ import annotations

import itertools
import random

import pytest
from shoal.kernels.standin import Form
from shoal.node.standins.standin_choice import Option, choose

FORMS = [Form("lowbit"), Form("narrow", 1), Form("narrow", 2), Form("narrow", 8)]


def experts(number: int) -> list[list[Option]]:
    """Of random loads; like real ones the forms that cost more mostly err less."""
    made = []
    for _ in range(number):
        load = random.choice([0.0, random.expovariate(1.0), 5 * random.random()])
        difficulty = random.random()
        made.append([
            Option(form, nbytes, load * flops, load * difficulty * error * random.uniform(0.7, 1.3))
            for form, nbytes, flops, error in zip(
                FORMS, (0.5625, 0.25, 0.5, 2.0), (1.0, 1 / 16, 1 / 8, 1 / 2), (0.01, 0.7, 0.5, 0.1), strict=True
            )
        ])  # fmt: skip
    return made


def total(options: list[list[Option]], chosen: tuple[int, ...] | list[int], what: str) -> float:
    return sum(getattr(each[number], what) for each, number in zip(options, chosen, strict=True))


def test_within_the_budgets_and_near_the_best_there_is() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)
    ratios = []
    for _ in range(150):
        options = experts(random.randint(1, 5))
        everything = sum(each[0].flops for each in options)
        budgets = {"nbytes": random.uniform(0.25, 2.0) * len(options), "flops": random.uniform(0.07, 1.0) * everything}
        if not all(total(options, [1] * len(options), what) <= budget for what, budget in budgets.items()):
            continue
        found = choose(options, **budgets)

        def fits(chosen: tuple[int, ...] | list[int], options=options, budgets=budgets) -> bool:
            return all(total(options, chosen, what) <= budget * (1 + 1e-9) for what, budget in budgets.items())

        assert fits(found)
        every = [c for c in itertools.product(range(len(FORMS)), repeat=len(options)) if fits(c)]
        best = min(total(options, chosen, "error") for chosen in every)
        uniform = [total(options, [n] * len(options), "error") for n in range(len(FORMS)) if fits([n] * len(options))]
        mine = total(options, found, "error")
        assert mine <= min(uniform) * (1 + 1e-9), "one form for all is never better"
        ratios.append(mine / best if best else 1.0)
    assert len(ratios) > 50
    assert sum(ratios) / len(ratios) < 1.5


def test_busy_experts_get_what_the_budget_allows() -> None:
    options = [
        [Option(FORMS[0], 0.5625, load, 0.0), Option(FORMS[1], 0.25, load / 16, load)] for load in (1.0, 30.0, 2.0, 0.0)
    ]
    assert choose(options, nbytes=0.5625 + 3 * 0.25, flops=100.0) == [1, 0, 1, 1]
    assert choose(options, nbytes=100.0, flops=100.0) == [0, 0, 0, 1], "nothing is spent on who is never asked"
    assert choose(options, nbytes=100.0, flops=5.0) == [0, 1, 0, 1], "the busiest is the dearest to compute"


def test_budgets_that_nothing_fits_are_refused() -> None:
    options = experts(3)
    with pytest.raises(ValueError, match="cheapest"):
        choose(options, nbytes=0.7, flops=1e9)


def test_many_experts_take_no_long() -> None:
    options = experts(600)
    everything = sum(each[0].flops for each in options)
    found = choose(options, nbytes=0.5625 * 600, flops=0.5 * everything)
    assert total(options, found, "nbytes") <= 0.5625 * 600 * (1 + 1e-9)
