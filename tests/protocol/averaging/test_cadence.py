"""When fragments are due, and how long a round waits for who is late."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.averaging.cadence import Cadence, Grace

every = st.integers(1, 200)


@given(parts=st.integers(1, 12), every=every, steps=st.integers(1, 500))
def test_each_fragment_is_due_once_per_h_steps_and_they_take_turns(parts, every, steps):
    cadences = [Cadence.of(index, parts, every) for index in range(parts)]
    for cadence in cadences:
        due = [step for step in range(1, steps + 1) if cadence.before(step) == step]
        assert len(due) in (steps // every, math.ceil(steps / every))
        assert all(b - a == every for a, b in itertools.pairwise(due))
    if every >= parts:
        gaps = [b.offset - a.offset for a, b in itertools.pairwise(cadences)]
        assert all(every // parts <= gap <= -(-every // parts) for gap in gaps)
    assert cadences[-1].offset == every


@given(every=every, offset=st.integers(1, 200), step=st.integers(0, 2000))
def test_who_joins_a_round_near_its_own_due_step_has_done_that_one(every, offset, step):
    cadence = Cadence(every, offset)
    nearest = cadence.nearest(step)
    assert (nearest - offset) % every == 0
    assert abs(nearest - step) <= (every + 1) / 2
    assert cadence.before(step) <= step < cadence.before(step) + every
    if (step - offset) % every == 0:
        assert nearest == step


@given(
    every=every,
    offset=st.integers(1, 200),
    growth=st.floats(0.01, 50.0),
    steps=st.integers(1, 3000),
    step=st.integers(-300, 6000),
)
def test_rounds_of_an_h_that_changes_are_as_far_apart_as_h_is_then(every, offset, growth, steps, step):
    growth = max(growth, 1 / every)
    cadence = Cadence(every, min(offset, every), growth, steps)
    last, following = cadence.before(step), cadence.after(step)
    assert last <= step < following
    assert (cadence.before(last), cadence.before(following), cadence.after(last)) == (last, following, following)
    h = [every * (1 + (growth - 1) * min(1.0, max(0.0, at / steps))) for at in (last, following)]
    assert min(h) - 1 <= following - last <= max(h) + 1  # one, because steps are whole
    nearest = cadence.nearest(step)
    assert nearest in (last, following)
    assert abs(nearest - step) <= (following - last + 1) / 2
    assert cadence.nearest(following) == following


def test_composers_that_are_some_steps_apart_merge_once_per_h_steps_not_twice():
    """The first to come to a due step opens the round, and all join it."""
    cadence, lags = Cadence(24, 12), [0, 3, 7, 10]
    done = [cadence.before(-lag) for lag in lags]
    rounds = 0
    for now in range(1, 241):
        steps = [now - lag for lag in lags]
        if any(step >= cadence.after(last) for step, last in zip(steps, done, strict=True)):
            rounds += 1
            done = [cadence.nearest(step) for step in steps]
    assert rounds == 240 // 24


def test_a_straggler_joins_and_opens_none():
    """At a quarter of the others' speed it never comes to a due step of its own first."""
    cadence = Cadence(8, 4)
    fast, slow, opened_by_slow = cadence.before(0), cadence.before(0), 0
    for now in range(1, 400):
        due_fast, due_slow = now >= fast + 8, now // 4 >= slow + 8
        opened_by_slow += due_slow and not due_fast
        if due_fast or due_slow:
            fast, slow = cadence.nearest(now), cadence.nearest(now // 4)
    assert opened_by_slow == 0


def test_before_anything_is_known_a_round_waits_as_long_as_it_may():
    grace = Grace(overlap=8, longest=5.0)
    assert grace.seconds == 5.0
    grace.took_step(0.5)
    assert grace.seconds == 5.0


def test_what_steps_and_rounds_leave_of_the_overlap_is_for_stragglers():
    grace = Grace(overlap=8, longest=5.0)
    grace.took_step(0.5)
    grace.took_round(quorum=0.5, sync=1.0)
    assert grace.seconds == pytest.approx(8 * 0.5 - 1.5)
    for _ in range(200):
        grace.took_round(quorum=0.25, sync=0.25)
    assert grace.seconds == pytest.approx(3.5)


seconds = st.floats(0.0, 100.0)


@given(
    overlap=st.integers(1, 100),
    longest=st.floats(0.01, 60.0),
    steps=st.lists(seconds, min_size=1, max_size=20),
    rounds=st.lists(st.tuples(seconds, seconds), min_size=1, max_size=20),
)
def test_it_is_never_longer_than_allowed_and_lets_a_step_end(overlap, longest, steps, rounds):
    grace = Grace(overlap, longest)
    for step in steps:
        grace.took_step(step)
    for quorum, sync in rounds:
        grace.took_round(quorum, sync)
    assert min(longest, min(steps)) * (1 - 1e-9) <= grace.seconds <= longest
