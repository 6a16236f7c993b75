"""Gradients of an interval, shared out over the steps of who learns from them."""

from __future__ import annotations

import contextlib
import math
import random

import torch
from shoal.node.sketches.shares import Shares, SummedGradient
from shoal.node.sketches.sketch_sums import LARGEST_GRADIENT
from tiny import HIDDEN, LAYERS, WIDTH, composer_of, manifest_of


def gradient(value: float = 1.0) -> SummedGradient:
    return SummedGradient(torch.full((2, 3), value), torch.full((3, 1), value))


def taken(shares: Shares, steps: int) -> tuple[float, float]:
    """Gradient and tokens of so many steps, added up."""
    gradients = tokens = 0.0
    for _ in range(steps):
        for share in shares.of_step():
            gradients += float(share.gradient.dense()[1].mean()) / share.steps
            tokens += share.tokens
    return gradients, tokens


def test_the_shares_of_an_interval_are_all_of_it_and_then_there_is_nothing() -> None:
    interval = random.randrange(2, 40)
    shares = Shares(interval)
    for sender in ("a", "b"):
        shares.put(sender, gradient(2.0), tokens=96.0, rows=3)
    torch.testing.assert_close(taken(shares, interval), (4.0, 192.0))
    assert taken(shares, 3) == (0.0, 0.0)


def test_every_step_takes_as_much() -> None:
    shares = Shares(8)
    shares.put("a", gradient(), tokens=96.0, rows=3)
    for _ in range(8):
        assert taken(shares, 1) == (1 / 8, 12.0)


def test_the_next_one_takes_the_place_of_what_is_left() -> None:
    shares = Shares(8)
    shares.put("a", gradient(), tokens=80.0, rows=3)
    assert taken(shares, 4) == (0.5, 40.0)
    shares.put("a", gradient(3.0), tokens=80.0, rows=3)
    shares.put("b", gradient(), tokens=16.0, rows=3)
    # a's came after four steps of this owner's and lasts for as many: a sender twice as fast counts for twice as much.
    torch.testing.assert_close(taken(shares, 4), (3.5, 88.0))
    torch.testing.assert_close(taken(shares, 4), (0.5, 8.0))
    assert taken(shares, 4) == (0.0, 0.0)


def test_of_a_sender_that_is_slower_shares_are_smaller_but_not_without_bound() -> None:
    shares = Shares(8)
    shares.put("a", gradient(), tokens=80.0, rows=3)
    taken(shares, 12)
    shares.put("a", gradient(), tokens=120.0, rows=3)
    assert taken(shares, 1) == (1 / 12, 10.0)
    taken(shares, 27)
    shares.put("a", gradient(), tokens=160.0, rows=3)
    assert taken(shares, 1) == (1 / 16, 10.0), "one that was lost does not stretch it for ever"
    taken(shares, 100)
    shares.put("a", gradient(), tokens=80.0, rows=3)
    assert taken(shares, 1) == (1 / 8, 10.0), "who was away for long is as new"
    taken(shares, 100)
    assert not shares._heard
    assert not shares._shares


def test_two_of_one_sender_within_a_step_both_count() -> None:
    shares = Shares(4)
    shares.put("a", gradient(), tokens=40.0, rows=3)
    shares.put("a", gradient(), tokens=40.0, rows=3)
    torch.testing.assert_close(taken(shares, 10), (2.0, 80.0))


def test_what_is_kept_takes_half_of_the_memory() -> None:
    shares = Shares(4)
    shares.put("a", gradient(1 / 3), tokens=40.0, rows=3)
    [share] = shares.of_step()
    assert isinstance(share.gradient, SummedGradient)
    assert share.gradient.d_down.dtype == torch.bfloat16


def test_what_is_refused_is_what_would_be_kept() -> None:
    """Rounding to bfloat16 can take a gradient that is just small enough beyond what a step may learn from."""
    composer = composer_of(manifest_of(sketch={"kind": "gradient", "gradient_every": 4}))
    composer.train_step()
    count = 3 * WIDTH * HIDDEN
    spacing = 2.0 ** (math.floor(math.log2(LARGEST_GRADIENT / math.sqrt(count))) - 7)
    value = (math.floor(LARGEST_GRADIENT / math.sqrt(count) / spacing) - 0.5) * spacing * 1.00001  # rounds up
    gate_up, down = torch.full((2 * WIDTH, HIDDEN), value), torch.full((HIDDEN, WIDTH), value)
    gate_up[0, 0] = math.sqrt((0.99999 * LARGEST_GRADIENT) ** 2 - (count - 1) * value**2)
    for step in (1, 2):
        mean = {position: (gate_up.clone(), down.clone()) for position in range(LAYERS)}
        with contextlib.suppress(ValueError):
            composer.hear_mean("liar", 0, mean, tokens=1.0, step=step)
    composer.train_step()
