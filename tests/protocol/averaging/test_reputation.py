"""Who spoils rounds is left out after few of them; who is slow, or is only accused, is not for long."""

from __future__ import annotations

import random
import secrets

import pytest
from shoal.protocol.averaging.reputation import MAX_SHUN_SECONDS, SHUN_SECONDS, STRIKES, Reputation, suspects

PEERS = [f"peer-{i}" for i in range(6)]
REST = PEERS[1:]


def test_most_reducers_are_believed_and_a_single_one_is_suspected_too() -> None:
    assert suspects({"peer-1": {"peer-0", "peer-2", "peer-3"}}, PEERS) == {"peer-1": 1.0}
    assert suspects({"peer-1": {"peer-0"}}, PEERS) == {"peer-1": 0.5, "peer-0": 0.5}
    assert suspects({"peer-1": {"peer-1"}}, PEERS) == {"peer-1": 0.5}, "its own word that it missed itself"
    assert suspects({}, PEERS) == {}


def test_a_proven_liar_is_left_out_at_once_and_longer_each_time() -> None:
    book, now = Reputation("me"), 100.0
    for times in range(12):
        assert book.failed(["liar"], {}, now) == ["liar"]
        assert book.failed(["liar"], {}, now) == [], "it is shunned already"
        seconds = min(MAX_SHUN_SECONDS, SHUN_SECONDS * 2**times)
        assert book.shunned(now + seconds - 1) == {"liar"}
        now += seconds
        assert book.shunned(now) == frozenset()


def test_silence_costs_something_only_if_it_goes_on() -> None:
    book = Reputation("me")
    for _ in range(5):  # a commit in between clears the slow one
        assert book.failed([], {"slow": 1.0}, 0.0) == []
        assert book.failed([], {"slow": 1.0}, 0.0) == []
        book.committed(["me", "slow"])
    failures = 0
    while not book.shunned(0.0):
        book.failed([], {"slow": 1.0}, 0.0)
        failures += 1
    assert failures == STRIKES


def test_on_suspicion_no_more_are_left_out_than_a_quorum_can_spare() -> None:
    book = Reputation("me")
    for _ in range(6):
        assert book.failed([], {"a": 1.0, "b": 1.5}, 0.0, spare=0) == []
    assert book.failed([], {"a": 0.5}, 0.0, spare=1) == ["b"]
    assert book.failed([], {}, 0.0, spare=0) == []
    assert book.failed(["c"], {}, 0.0, spare=0) == ["c"], "what is proven needs no quorum"
    book.committed(["me", "a"])
    assert book.failed([], {"a": 1.0}, 0.0, spare=1) == []


def test_who_has_spoiled_nothing_for_long_is_as_if_it_never_had() -> None:
    book, now = Reputation("me"), 100.0
    for number in range(50):
        book.failed([f"liar {number}"], {f"slow {number}": 1.0}, now)
        now += SHUN_SECONDS + MAX_SHUN_SECONDS
    assert book.shunned(now) == frozenset()
    assert book.failed(["liar 49"], {}, now) == ["liar 49"]
    assert book.shunned(now + SHUN_SECONDS) == frozenset(), "for no longer than the first time"
    assert len(book._records) == 1, "of the peers that come and go in weeks"


def test_nobody_shuns_itself() -> None:
    book = Reputation("me")
    for _ in range(10):
        assert book.failed(["me"], {"me": 1.0}, 0.0) == []
    assert book.shunned(0.0) == frozenset()


@pytest.mark.parametrize("kind", ["bad parts for one reducer", "false accusations"])
def test_a_liar_is_left_out_by_all_and_few_honest_ones_with_it(kind: str) -> None:
    """Six members, one of them a liar with a victim of its choice in each round; rounds go on until nobody meets it."""
    dice = random.Random(seed := secrets.randbits(32))
    books = {peer: Reputation(peer) for peer in PEERS}
    liar, rounds = PEERS[0], 0
    while any(liar not in books[peer].shunned(0.0) for peer in REST):
        rounds += 1
        victim = dice.choice(REST)
        sinner, reducer = (liar, victim) if kind.startswith("bad") else (victim, liar)
        members = {peer for peer in PEERS if peer not in books[PEERS[1]].shunned(0.0)}
        for peer in REST:
            proven = [liar] if kind.startswith("bad") and peer == victim else []
            books[peer].failed(proven, suspects({sinner: {reducer}}, members | {liar, victim}), 0.0)
        assert rounds <= 2 * STRIKES, f"{seed=}"
    for peer in REST:
        assert len(books[peer].shunned(0.0) - {liar}) <= 1, f"{seed=}"
