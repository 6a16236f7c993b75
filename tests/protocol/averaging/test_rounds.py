"""Votes, quorums, and which round is next."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.averaging.rounds import (
    latest_commit,
    most_held,
    possible,
    quorum,
    tally,
)

P = 2
A, B = b"a" * 32, b"b" * 32


@dataclass(frozen=True)
class Vote:
    round: int
    digest: bytes
    fragment: int = 0


@pytest.mark.parametrize(("active", "needed"), [(0, 2), (1, 2), (2, 2), (3, 2), (4, 3), (5, 3), (10, 6)])
def test_quorum(active, needed):
    assert quorum(active) == needed


def test_a_majority_commits_and_names_who_differs():
    votes = {"x": Vote(2, A), "y": Vote(2, B), "z": Vote(2, A)}
    verdict = tally(votes, 2, P, quorum(3))
    assert (verdict.committed, verdict.supporters, verdict.dissenters) == (A, ("x", "z"), ("y",))


def test_the_latest_commit_is_the_highest_round_with_a_quorum():
    votes = {"w": Vote(2, A), "x": Vote(2, A), "y": Vote(4, A), "z": Vote(4, A), "new": Vote(6, B)}
    assert latest_commit([votes], P, 2) == 4
    assert latest_commit([votes], P, 3) is None
    assert latest_commit([votes, {"x": Vote(7, A, 1), "y": Vote(7, A, 1)}], P, 2) == 7
    assert latest_commit([{"x": Vote(2, A), "y": Vote(2, B)}], P, 2) is None


def test_most_held_is_one_choice_for_all():
    assert most_held({}) is None
    assert most_held({"x": Vote(2, A), "y": Vote(2, A), "z": Vote(8, B)}) == (2, A)
    assert most_held({"x": Vote(2, B), "y": Vote(8, A)}) == (8, A)
    assert most_held({"x": Vote(2, B), "y": Vote(2, A)}) == (2, B)


def test_votes_for_rounds_that_cannot_be_are_left_out():
    votes = {"x": Vote(8, A), "of another fragment": Vote(9, B), "the last one": Vote((1 << 48) - 2, B)}
    assert most_held(possible(votes, 0, 6, P)) == (8, A)
    assert possible(votes, 0, -1, P).keys() == {"x"}


def test_votes_for_another_round_or_fragment_do_not_count():
    assert tally({"x": Vote(2, A), "y": Vote(4, A)}, 2, P, 2).committed is None
    assert tally({"x": Vote(2, A), "y": Vote(2, A, fragment=1)}, 2, P, 2).committed is None


def test_without_a_majority_rule_two_winners_cancel():
    assert tally({"w": Vote(0, A), "x": Vote(0, A), "y": Vote(0, B), "z": Vote(0, B)}, 0, P, 2).committed is None


@given(st.data())
def test_two_digests_never_both_commit(data):
    """Observers see different subsets of the votes, at different times; each peer votes once; all count the same
    active peers."""
    active = data.draw(st.integers(1, 12))
    peers = [f"p{i}" for i in range(active)]
    cast = {peer: Vote(0, data.draw(st.sampled_from([A, B, b"c" * 32]))) for peer in peers}
    committed = set()
    for _ in range(data.draw(st.integers(1, 6))):
        seen = data.draw(st.sets(st.sampled_from(peers)))
        verdict = tally({peer: cast[peer] for peer in seen}, 0, P, quorum(active))
        if verdict.committed is not None:
            committed.add(verdict.committed)
            assert set(verdict.supporters) | set(verdict.dissenters) == seen
    assert len(committed) <= 1
