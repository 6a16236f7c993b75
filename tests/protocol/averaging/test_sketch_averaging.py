"""Composers average sketches of a slot's gradients, its owner receives the mean: real hivemind peers on loopback."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from averaging_swarm import all_equal, reasons, statuses

TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "int8": 0.03}  # of values around 1, encoded twice


@pytest.fixture
def random():
    seed = secrets.randbits(32)
    print(f"{seed=}")
    return np.random.default_rng(seed)


def sums(random, numel, tokens):
    """One sketch per count of tokens: a sum over them."""
    return [random.normal(size=numel) * count for count in tokens]


@pytest.mark.parametrize("codec", TOLERANCE)
def test_an_owner_without_tokens_receives_the_mean_over_all_tokens(swarm, random, codec):
    numel = 20_001
    # The owner cannot be dialled: whatever it sent would show in its count of bytes, for it reduces nothing.
    peers = swarm.start(3, codec=codec, sketches=(2, numel), faults={2: "client"}, part_bytes=1 << 12)
    tokens = [int(count) for count in random.integers(100, 200, size=2)]
    sketches = sums(random, numel, tokens)
    for interval in range(2):
        for peer, sketch, count in zip(peers[:2], sketches, tokens, strict=True):
            peer.submit_sketch(1, sketch, tokens=count, owner=peers[2], interval=interval)
        peers[2].submit_sketch(1, None, tokens=0, owner=peers[2], interval=interval)
        outcomes = [peer.outcome() for peer in peers]
        assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
        assert all_equal(outcomes)
        mean = (sketches[0] + sketches[1]) / sum(tokens)
        np.testing.assert_allclose(outcomes[2]["average"], mean, atol=TOLERANCE[codec] * np.abs(mean).max())
        for outcome in outcomes:
            assert outcome["fraction"] == 1.0
            assert sorted(outcome["tokens"]) == sorted([0, *tokens])
            assert outcome["credited"] == sum(tokens)
        assert outcomes[2]["bytes_sent"] == 0 < outcomes[2]["bytes_received"]


def test_slots_and_the_backbone_are_averaged_at_the_same_time(swarm, random):
    slots, numel = 6, 3000
    peers = swarm.start(3, sketches=(slots, numel), sizes=(5000,), matchmaking_seconds=6.0, timeout_seconds=25.0)
    sketches = {(i, slot): random.normal(size=numel) for i in range(3) for slot in range(slots)}
    for i, peer in enumerate(peers):
        peer.submit(np.full(5000, float(i)), expected=3, quorum=3)
        for slot in random.permutation(slots).tolist():  # in any order: no slot waits for another one
            owns = slot % 3 == i
            sketch = None if owns else sketches[i, slot]
            peer.submit_sketch(slot, sketch, tokens=0 if owns else 50, owner=peers[slot % 3])
    outcomes = [[peer.outcome() for _ in range(slots + 1)] for peer in peers]
    found = [{(o["average"].size, o["round"]): o for o in ours} for ours in outcomes]
    for ours in outcomes:
        assert statuses(ours) == ["complete"] * (slots + 1), reasons(ours)
        assert all(outcome["matchmaking_seconds"] < 6.0 for outcome in ours), "full groups must not wait"
    for i in range(3):
        np.testing.assert_allclose(found[i][5000, 0]["average"], 1.0, atol=1e-5)
        for slot in range(slots):
            mean = sum(sketches[j, slot] for j in range(3) if j != slot % 3) / 100
            np.testing.assert_allclose(found[i][numel, slot]["average"], mean, atol=1e-6)


def test_a_liar_counts_for_three_medians(swarm):
    peers = swarm.start(4, sketches=(1, 500))
    for peer, value, tokens in zip(peers[:3], (0.0, 0.0, 1.0), (100, 200, 10**9), strict=True):
        peer.submit_sketch(0, np.full(500, value * tokens), tokens=tokens, owner=peers[3], expected=4)
    peers[3].submit_sketch(0, None, tokens=0, owner=peers[3], expected=4)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 4, reasons(outcomes)
    np.testing.assert_allclose(outcomes[3]["average"], 600 / 900, atol=1e-5)  # the median is 200, whoever receives
    assert outcomes[3]["credited"] == 900


def test_nothing_that_is_not_finite_becomes_a_result(swarm):
    peers = swarm.start(3, sketches=(1, 3000), faults={1: "nan"})
    broken = np.ones(3000)
    broken[secrets.randbelow(3000)] = secrets.choice((np.nan, np.inf, -np.inf))
    for peer, sketch in ((peers[0], np.ones(3000)), (peers[1], broken)):
        peer.submit_sketch(0, sketch, tokens=10, owner=peers[2])
    peers[2].submit_sketch(0, None, tokens=0, owner=peers[2])
    outcomes = [peer.outcome() for peer in peers]
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome["status"] == "partial", reasons(outcomes)
        assert outcome["average"] is None
        assert peers[1].peer_id in outcome["failed"]
    peers[0].submit_sketch(0, broken, tokens=10, owner=peers[2], interval=1)
    assert peers[0].outcome(1)["status"] == "refused"  # an honest peer does not even try


def test_no_result_without_tokens_or_without_the_owner(swarm):
    peers = swarm.start(3, sketches=(2, 400), matchmaking_seconds=1.5)
    peers[2].submit_sketch(0, None, tokens=0, owner=peers[2])
    for peer in peers[:2]:
        peer.submit_sketch(1, np.ones(400), tokens=5, owner=peers[2])  # the owner does not come
    assert peers[2].outcome()["status"] == "no_group"
    outcomes = [peer.outcome() for peer in peers[:2]]
    assert statuses(outcomes) == ["refused"] * 2, reasons(outcomes)
    assert all("did not come" in outcome["detail"] for outcome in outcomes)


def test_other_leases_owners_and_sketchers_do_not_meet(swarm):
    peers = swarm.start(4, sketches=(1, 400), sketchers={3: "rank 8"}, matchmaking_seconds=1.5)
    peers[0].submit_sketch(0, np.ones(400), tokens=5, owner=peers[1], epoch=7)
    peers[1].submit_sketch(0, None, tokens=0, owner=peers[1], epoch=7)
    peers[2].submit_sketch(0, np.full(400, 100.0), tokens=5, owner=peers[1], epoch=6)
    peers[3].submit_sketch(0, np.full(400, 100.0), tokens=5, owner=peers[1], epoch=7)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete", "complete", "no_group", "no_group"], reasons(outcomes)
    np.testing.assert_allclose(outcomes[1]["average"], 0.2, rtol=1e-6)

    peers[0].submit_sketch(0, np.ones(400), tokens=5, owner=peers[1], interval=1)
    peers[1].submit_sketch(0, np.ones(400), tokens=5, owner=peers[2], interval=1)
    peers[2].submit_sketch(0, None, tokens=0, owner=peers[2], interval=1, expected=2)
    outcomes = [peer.outcome() for peer in peers[:3]]
    assert statuses(outcomes) == ["no_group", "complete", "complete"], reasons(outcomes)


def test_only_the_owner_receives_without_bringing(swarm):
    peers = swarm.start(4, sketches=(1, 400), faults={3: "freeloader"}, matchmaking_seconds=2.0)
    for interval, avoid in enumerate(((), [peers[3].peer_id])):
        for peer in peers[:2]:
            peer.submit_sketch(0, np.ones(400), tokens=5, owner=peers[2], interval=interval, avoid=avoid)
        for peer in peers[2:]:
            peer.submit_sketch(0, None, tokens=0, owner=peers[2], interval=interval, avoid=avoid)
        outcomes = [peer.outcome() for peer in peers]
        assert outcomes[3]["average"] is None
        assert outcomes[3]["status"] != "complete"
        if avoid:  # until then, whoever it led has refused its group
            assert statuses(outcomes[:3]) == ["complete"] * 3, reasons(outcomes)


@pytest.mark.parametrize("fault", ["frozen", "frozen client"])
def test_an_owner_that_dies_after_matchmaking(swarm, fault):
    peers = swarm.start(3, sketches=(1, 20_000), faults={2: fault}, timeout_seconds=12.0)
    for peer in peers[:2]:
        peer.submit_sketch(0, np.ones(20_000), tokens=10, owner=peers[2])
    peers[2].submit_sketch(0, None, tokens=0, owner=peers[2])
    peers[2].next("frozen")
    peers[2].kill()
    outcomes = [peer.outcome() for peer in peers[:2]]
    # It reduced a third of the vector, or nothing; what it would have brought is missed by nobody.
    expected = "partial" if fault == "frozen" else "complete"
    assert statuses(outcomes) == [expected] * 2, reasons(outcomes)
    if expected == "partial":
        assert all(peers[2].peer_id in outcome["failed"] for outcome in outcomes)
    heir, other = peers[:2]
    heir.submit_sketch(0, None, tokens=0, owner=heir, interval=1, epoch=1, expected=2)
    other.submit_sketch(0, np.ones(20_000), tokens=10, owner=heir, interval=1, epoch=1, expected=2)
    outcomes = [peer.outcome() for peer in peers[:2]]
    assert statuses(outcomes) == ["complete"] * 2, reasons(outcomes)
