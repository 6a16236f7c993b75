"""Numbers of intervals: all count alike, newcomers learn, liars do not lead anybody away for good."""

from __future__ import annotations

import random
import secrets

import pytest
from shoal.protocol.experts.sketch_intervals import AHEAD, STRIKES, Heard, Intervals, interval_seed

LIMIT = 1 << 40


def settled(interval: int) -> Intervals:
    """A peer that has taken part in `interval`."""
    intervals = Intervals(LIMIT)
    assert intervals.hear(interval) is Heard.OPEN
    intervals.completed()
    return intervals


def test_seeds_are_fixed_and_differ_by_run_and_interval() -> None:
    assert interval_seed("tiny-0123456789ab", 7) == int("ed267ca291b0e60145d69cd88e0a3549", 16)
    seeds = {interval_seed(run, interval) for run in ("a-1", "a-11") for interval in (*range(50), 111)}
    assert len(seeds) == 102
    assert all(0 <= seed < 1 << 128 for seed in seeds)


def test_one_opens_and_the_others_follow() -> None:
    first, second = Intervals(LIMIT), Intervals(LIMIT)
    for interval in range(5):
        assert first.open(interval)
        assert second.hear(interval) is Heard.OPEN
        assert not second.open(interval)  # it has been opened
        assert first.hear(interval) is Heard.KNOWN  # both had it due at the same time
        assert first.next == second.next == interval + 1
    assert not first.open(9)


def test_a_newcomer_believes_the_first_opening() -> None:
    newcomer = Intervals(LIMIT)
    assert newcomer.open(0)  # before it has heard of any
    assert newcomer.hear(5_000_000) is Heard.OPEN
    assert newcomer.next == 5_000_001
    assert newcomer.hear(5_000_000 + 1 + AHEAD) is Heard.OPEN  # some openings were lost
    assert newcomer.hear(2 * 5_000_000) is Heard.FAR_AHEAD
    assert newcomer.next == 5_000_002 + AHEAD


def test_what_is_far_ahead_or_behind_is_refused() -> None:
    peer = settled(100)
    assert peer.hear(101 + AHEAD + 1) is Heard.FAR_AHEAD
    peer.completed()
    assert peer.hear(99) is Heard.STALE
    assert peer.hear(100) is Heard.KNOWN
    assert peer.next == 101
    assert Intervals(10).hear(10) is Heard.FAR_AHEAD  # for newcomers too: there is no such interval
    assert not Intervals(0).open(0)


@pytest.mark.parametrize("stray", [3, 5000])
def test_who_has_gone_astray_comes_back(stray: int) -> None:
    """The others are at 1000: opening after opening is refused, until the peer doubts its own number."""
    peer = settled(stray)
    heard = [peer.hear(interval) for interval in range(1000, 1000 + STRIKES + 2)]
    assert Heard.OPEN not in heard[:STRIKES]
    assert heard[STRIKES + 1] is Heard.OPEN
    assert peer.next == 1000 + STRIKES + 2


def test_who_takes_part_in_complete_rounds_is_not_led_away() -> None:
    peer = settled(0)
    for interval in range(1, 50):
        lies = [peer.hear(secrets.randbelow(LIMIT - 1000) + 1000) for _ in range(STRIKES)]
        assert set(lies) == {Heard.FAR_AHEAD}
        assert peer.hear(interval) is Heard.OPEN
        peer.completed()


def test_peers_that_count_differently_find_one_number() -> None:
    """Openings come in random order from composers with random numbers; a round is complete if all count alike."""
    peers = [settled(random.randrange(10_000)) for _ in range(4)]
    for _ in range(200):
        opener = random.choice(peers)
        interval = opener.next
        assert opener.open(interval)
        for peer in peers:
            if peer is not opener:
                peer.hear(interval)
        if len({peer.next for peer in peers}) == 1:
            for peer in peers:
                peer.completed()
            break
    assert len({peer.next for peer in peers}) == 1
