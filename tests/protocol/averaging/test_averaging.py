"""Real hivemind peers, each in processes of its own, average over loopback."""

from __future__ import annotations

import os
import secrets
import signal
from importlib.metadata import version

import numpy as np
import pytest
import torch
from averaging_swarm import all_equal, living, reasons, statuses, until
from shoal.protocol.averaging.fragments import Fragment, unflatten
from shoal.protocol.averaging.radial import combine, split

CODECS = ("float32", "float16", "int8", "int4")
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "int8": 0.05, "int4": 0.12}


def test_numpy_is_one_that_hivemind_works_with():
    assert tuple(map(int, version("numpy").split(".")[:2])) < (2, 4), "numpy >= 2.4 breaks hivemind's 8-bit codecs"


@pytest.mark.parametrize("codec", CODECS)
def test_two_peers_meet_at_the_mean_bit_for_bit(swarm, codec):
    peers = swarm.start(2, codec=codec, sizes=(10_000, 3000), part_bytes=1 << 12)
    zero, one = peers
    zero.submit(np.zeros(10_000))
    one.submit(np.ones(10_000))
    outcomes = [peer.outcome() for peer in peers]
    for outcome in outcomes:
        assert outcome["status"] == "complete", (outcome["detail"], outcome["failed"])
        assert outcome["fraction"] == 1.0
        assert set(outcome["members"]) == {zero.peer_id, one.peer_id}
        np.testing.assert_allclose(outcome["average"], 0.5, atol=TOLERANCE[codec])
    assert outcomes[0]["average"].tobytes() == outcomes[1]["average"].tobytes()

    generator = np.random.default_rng(seed := secrets.randbits(32))
    a, b = generator.normal(size=(2, 3000))
    zero.submit(a, round=1, tokens=300, steps=10)  # fragment 1; weights 9000 : 4000
    one.submit(b, round=1, tokens=200, steps=10)
    outcomes = [peer.outcome() for peer in peers]
    assert [outcome["status"] for outcome in outcomes] == ["complete"] * 2, f"{seed=} {outcomes}"
    assert outcomes[0]["average"].tobytes() == outcomes[1]["average"].tobytes()
    expected = (9 * a + 4 * b) / 13
    np.testing.assert_allclose(outcomes[0]["average"], expected, atol=5 * TOLERANCE[codec], err_msg=f"{seed=}")


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_norms_and_directions_are_merged_to_the_same_bits(swarm, codec):
    tensors = {"embed_tokens": 3000, "w0": 5000, "w1": 1}
    backbone = Fragment(0, tuple(tensors), tuple(tensors.values()), sum(tensors.values()))
    peers = swarm.start(3, codec=codec, sizes=(tensors,), part_bytes=1 << 12)
    generator = np.random.default_rng(seed := secrets.randbits(32))
    vectors = generator.normal(size=(3, backbone.numel)).astype(np.float32) * 1e-2
    vectors[2, 3000:] *= 100  # too long: what counts is three times the median
    vectors[:, -1] = 1e-5, 2e-5, 3e-5  # far smaller than its neighbours
    for peer, vector in zip(peers, vectors, strict=True):
        sent, norms = split(backbone, torch.from_numpy(vector))
        peer.submit(sent.numpy(), expected=3, quorum=3, norms=norms)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
    merged = [combine(backbone, torch.from_numpy(outcome["average"]), outcome["facts"]) for outcome in outcomes]
    assert len({vector.numpy().tobytes() for vector in merged}) == 1
    found = {name: tensor.numpy() for name, tensor in unflatten(backbone, merged[0]).items()}

    mean, body = vectors[:, :3000].mean(0), vectors[:, 3000:8000].astype(np.float64)
    assert np.linalg.norm(found["embed_tokens"] - mean) < TOLERANCE[codec] * np.linalg.norm(mean), f"{seed=}"
    norms = np.linalg.norm(body, axis=1)
    direction = (body / norms[:, None]).sum(0)
    expected = np.minimum(norms, 3 * np.median(norms)).mean() * direction / np.linalg.norm(direction)
    assert np.linalg.norm(found["w0"] - expected) < TOLERANCE[codec] * np.linalg.norm(expected), f"{seed=}"
    np.testing.assert_allclose(found["w1"], 2e-5, rtol=1e-5)


def test_rounds_and_bases_do_not_mix(swarm):
    peers = swarm.start(4, sizes=(600, 600), matchmaking_seconds=4.0, timeout_seconds=16.0)
    same, other = bytes(32), bytes([1]) * 32
    for peer, round_, base in zip(peers, (0, 0, 2, 2), (same, same, other, other), strict=True):
        peer.submit(np.full(600, float(round_)), round=round_, base=base)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 4, reasons(outcomes)
    assert [outcome["average"][0] for outcome in outcomes] == [0.0, 0.0, 2.0, 2.0]

    # One round, two bases, and expected = 4: each pair waits for the window's end, then goes without the other.
    for peer, base in zip(peers, (same, other, same, other), strict=True):
        peer.submit(np.full(600, float(base[0])), round=4, base=base, expected=4)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 4, reasons(outcomes)
    assert [outcome["average"][0] for outcome in outcomes] == [0.0, 1.0, 0.0, 1.0]
    assert {len(outcome["members"]) for outcome in outcomes} == {2}


def test_starts_at_once_when_everybody_is_there_and_without_stragglers_at_the_end(swarm):
    peers = swarm.start(3, sizes=(5000,), matchmaking_seconds=3.0)
    for attempt in range(3):
        for peer in peers:
            peer.submit(np.full(5000, 3.0), round=attempt, expected=3)
        outcomes = [peer.outcome() for peer in peers]
        assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
        assert all_equal(outcomes)
        assert all(outcome["seconds"] < 3.0 for outcome in outcomes), "full groups must not wait for the window's end"
    for peer in peers[:2]:
        peer.submit(np.full(5000, 1.0), round=7, expected=3)
    outcomes = [peer.outcome() for peer in peers[:2]]
    assert statuses(outcomes) == ["complete"] * 2, reasons(outcomes)
    assert all(outcome["matchmaking_seconds"] > 2.5 for outcome in outcomes)
    peers[0].submit(np.zeros(5000), round=8, expected=3)
    assert peers[0].outcome()["status"] == "no_group"


def test_who_finds_a_round_full_has_no_group_and_the_others_have_theirs(swarm):
    """As the 129th composer does: a round holds 128, and its work waits for the next one."""
    peers = swarm.start(4, sizes=(5000,), matchmaking_seconds=4.0)
    for peer in peers:
        peer.submit(np.full(5000, 3.0), round=0, expected=3, quorum=3)
    outcomes = [peer.outcome() for peer in peers]
    assert sorted(statuses(outcomes)) == ["complete"] * 3 + ["no_group"], reasons(outcomes)
    assert {len(outcome["members"]) for outcome in outcomes if outcome["status"] == "complete"} == {3}


def test_a_group_with_a_quorum_waits_for_the_others_as_long_as_its_leader_grants(swarm):
    peers = swarm.start(3, sizes=(5000,), matchmaking_seconds=8.0, timeout_seconds=20.0)
    for peer in peers[:2]:
        peer.submit(np.full(5000, 1.0), round=0, expected=3, grace=0.5)
    outcomes = [peer.outcome() for peer in peers[:2]]
    assert statuses(outcomes) == ["complete"] * 2, reasons(outcomes)
    assert all(0.5 <= outcome["matchmaking_seconds"] < 5.0 for outcome in outcomes), "it did not wait for the window"
    assert all(outcome["quorum_seconds"] <= outcome["matchmaking_seconds"] for outcome in outcomes)
    # By the clock of its leader, whoever that is: the other one began a little earlier or later.
    assert any(outcome["quorum_seconds"] + 0.499 <= outcome["matchmaking_seconds"] for outcome in outcomes)

    for peer in peers[:2]:
        peer.submit(np.full(5000, 1.0), round=1, expected=4, grace=6.0)
    peers[2].submit(np.full(5000, 4.0), round=1, expected=4, grace=6.0)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
    assert {len(outcome["members"]) for outcome in outcomes} == {3}, "who comes within the grace is in it"


def test_rounds_of_two_fragments_are_under_way_at_the_same_time(swarm):
    peers = swarm.start(3, sizes=(600, 900), matchmaking_seconds=6.0)
    for peer in peers[:2]:
        peer.submit(np.full(600, 1.0), round=0, expected=3)  # waits for the third
    for peer in peers:
        peer.submit(np.full(900, 2.0), round=1, expected=3)
    first = [peer.outcome() for peer in peers]
    assert {outcome["average"][0] for outcome in first} == {2.0}, "the later one is there first"
    peers[2].submit(np.full(600, 4.0), round=0, expected=3)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(first + outcomes) == ["complete"] * 6, reasons(first + outcomes)
    assert {float(outcome["average"][0]) for outcome in outcomes} == {2.0}
    assert {len(outcome["members"]) for outcome in outcomes} == {3}


def test_the_end_of_an_answer_is_not_lost_in_thousands_of_streams(swarm):
    """120 rounds of 4 members. While whoever was called closed first, about one in twenty lost a part, or a group."""
    peers = swarm.start(4, sizes=(900,) * 4, matchmaking_seconds=12.0, timeout_seconds=36.0)
    for turn in range(30):
        for peer in peers:
            for fragment in range(4):
                peer.submit(np.full(900, 3.0), round=4 * turn + fragment, expected=4, quorum=4)
        outcomes = [peer.outcome(60) for peer in peers for _ in range(4)]
        assert statuses(outcomes) == ["complete"] * 16, (turn, reasons(outcomes))


def test_weights_come_from_capped_facts_and_not_from_messages(swarm):
    peers = swarm.start(3, sizes=(2000,), faults={1: "client", 2: "liar"})  # the second one cannot be dialled
    values = (0.0, 0.0, 1.0)
    for peer, value in zip(peers, values, strict=True):
        peer.submit(np.full(2000, value), expected=3, quorum=3)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
    np.testing.assert_allclose(outcomes[0]["average"], 1 / 3, atol=1e-5)  # it stated 1e9 with every part
    for peer, value in zip(peers, values, strict=True):
        peer.submit(np.full(2000, value), round=1, expected=3, quorum=3, tokens=10**9 if value else 100)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
    np.testing.assert_allclose(outcomes[0]["average"], 3 / 5, atol=1e-5)  # signed a lie: 3 times the median, no more


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_robust_rounds_follow_the_honest_majority_and_end_with_equal_bytes(swarm, codec):
    peers = swarm.start(4, codec=codec, sizes=(3000,), robust=True)
    generator = np.random.default_rng(seed := secrets.randbits(32))
    honest = generator.normal(size=3000) + 0.3 * generator.normal(size=(3, 3000))
    for peer, vector in zip(peers, [*honest, -1000 * honest[0]], strict=True):
        peer.submit(vector, expected=4, quorum=4)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 4, reasons(outcomes)
    assert all_equal(outcomes)
    mean = honest.mean(0)
    harm = np.linalg.norm(outcomes[0]["average"] - mean) / np.linalg.norm(mean)
    assert harm < 0.35, f"{seed=}"  # the mean itself would be off by 250


@pytest.mark.parametrize("robust", [False, True])
def test_those_who_have_finished_are_there_and_change_nothing(swarm, robust):
    peers = swarm.start(3, sizes=(3000,), robust=robust)
    learned = np.random.default_rng(secrets.randbits(32)).normal(size=3000)
    for peer, vector in zip(peers, [np.zeros(3000), learned, np.zeros(3000)], strict=True):
        peer.submit(vector, expected=3, quorum=3, tokens=4096 if vector.any() else 1)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
    assert all_equal(outcomes)
    assert all(len(outcome["members"]) == 3 for outcome in outcomes)
    np.testing.assert_allclose(outcomes[0]["average"], learned, atol=1e-2)


@pytest.mark.parametrize("absurd", [np.nan, 6e4])
def test_a_sender_of_nan_is_named_and_nothing_is_committed(swarm, absurd):
    """The mean of what two have learned and of 60,000 would be finite, and the end of the model."""
    peers = swarm.start(3, sizes=(3000,), faults={1: "nan"})
    vectors = [np.ones(3000), np.ones(3000), np.ones(3000)]
    for third in range(3):  # one in every reducer's part
        vectors[1][1000 * third + secrets.randbelow(1000)] = absurd
    for peer, vector in zip(peers, vectors, strict=True):
        peer.submit(vector, expected=3, quorum=3)
    outcomes = [peer.outcome() for peer in peers]
    assert all(outcome["status"] == "partial" and outcome["average"] is None for outcome in (outcomes[0], outcomes[2]))
    assert outcomes[1]["status"] != "complete"
    for outcome in (outcomes[0], outcomes[2]):
        assert peers[1].peer_id in outcome["failed"], reasons(outcomes)
        assert outcome["fraction"] < 1
    # Its own part overflows, too, and may end its round before the other reducers have its NaN. One has it.
    assert {proven for outcome in (outcomes[0], outcomes[2]) for proven in outcome["proven"]} == {peers[1].peer_id}
    for i in (0, 2):
        peers[i].submit(np.ones(3000), attempt=1, expected=2, avoid=[peers[1].peer_id])
    peers[1].submit(np.ones(3000), attempt=1, expected=2)
    again = [peers[i].outcome() for i in (0, 2)]
    assert statuses(again) == ["complete"] * 2, reasons(again)
    assert all(peers[1].peer_id not in outcome["members"] for outcome in again)
    assert peers[1].outcome()["status"] == "no_group"

    for number, value in ((5, np.inf), (6, absurd)):
        peers[0].submit(np.full(3000, value), round=number)
        assert peers[0].outcome(1)["status"] == "refused"  # an honest peer does not even try


def test_a_peer_with_forged_facts_does_not_stop_the_others(swarm):
    peers = swarm.start(3, sizes=(2000,), faults={2: "forged"})
    for peer in peers[:2]:
        peer.submit(np.ones(2000), expected=2)
    until(lambda: peers[0].connection.poll() and peers[1].connection.poll(), 10, "two honest peers")
    assert statuses([peer.outcome() for peer in peers[:2]]) == ["complete"] * 2
    # The forger came first, so the others ask it to lead: they refuse its group and go on without it.
    peers[2].submit(np.zeros(2000), round=1, expected=3)
    for peer in peers[:2]:
        peer.submit(np.ones(2000), round=1, expected=3)
    outcomes = [peer.outcome() for peer in peers]
    assert outcomes[2]["average"] is None
    attempt = 1
    if statuses(outcomes[:2]) != ["complete"] * 2:
        blamed = set().union(*(outcome["failed"] for outcome in outcomes[:2]))
        assert peers[2].peer_id in blamed, reasons(outcomes)
        for peer in peers[:2]:
            peer.submit(np.ones(2000), round=1, attempt=attempt, expected=2, avoid=[peers[2].peer_id])
        outcomes = [peer.outcome() for peer in peers[:2]]
        assert statuses(outcomes) == ["complete"] * 2, reasons(outcomes)


@pytest.mark.parametrize("codec", ["float16"])
def test_a_peer_killed_after_matchmaking_makes_the_round_partial_for_all(swarm, codec):
    peers = swarm.start(4, codec=codec, sizes=(40_000,), faults={3: "frozen"}, timeout_seconds=14.0)
    for peer in peers:
        peer.submit(np.full(40_000, 1.0), expected=4, quorum=3)
    peers[3].next("frozen")
    peers[3].kill()
    outcomes = [peer.outcome() for peer in peers[:3]]
    for outcome in outcomes:
        assert outcome["status"] == "partial", reasons(outcomes)
        assert outcome["average"] is None
        assert peers[3].peer_id in outcome["failed"]
        assert outcome["fraction"] < 1
        assert len(outcome["members"]) == 4
    for peer in peers[:3]:
        peer.submit(np.full(40_000, 1.0), attempt=1, expected=3, quorum=3, avoid=[peers[3].peer_id])
    outcomes = [peer.outcome() for peer in peers[:3]]
    assert statuses(outcomes) == ["complete"] * 3, reasons(outcomes)
    assert all_equal(outcomes)


def test_a_killed_parent_leaves_nothing_and_a_killed_averager_is_noticed(swarm):
    first, second = swarm.start(2)
    assert first.averager_pid in {pid for pid, _ in first.processes}
    first.submit(np.zeros(1000), expected=2)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not living(first.processes), 5, "all of a killed peer's processes are gone")

    second.submit(np.zeros(1000), expected=2)
    os.kill(second.averager_pid, signal.SIGKILL)
    assert second.next("error", 5)[0] == "AveragerEnded"
    second.submit(np.zeros(1000), expected=2)
    assert second.next("error", 5)[0] == "AveragerEnded"


def test_an_averager_that_hangs_is_given_up_and_then_ended(swarm):
    (peer,) = swarm.start(1, matchmaking_seconds=0.5, timeout_seconds=2.5)
    os.kill(peer.averager_pid, signal.SIGSTOP)
    peer.submit(np.zeros(1000))
    assert peer.outcome()["status"] == "timed_out"
    averager = {(pid, created) for pid, created in peer.processes if pid == peer.averager_pid}
    until(lambda: not living(averager), 30, "its end")
    peer.submit(np.zeros(1000), round=1)
    kind, reason = peer.next("error", 5)
    assert kind == "AveragerEnded"
    assert "answered nothing" in reason


def test_an_averager_that_hangs_holds_up_nobody_who_abandons_its_round(swarm):
    """A peer abandons it at each news for as long as the round has no end, and its pipe holds some hundred words."""
    (peer,) = swarm.start(1, matchmaking_seconds=0.5, timeout_seconds=2.5)
    os.kill(peer.averager_pid, signal.SIGSTOP)
    peer.submit(np.zeros(1000))
    peer.abandon(0, times=3000)
    assert peer.outcome()["status"] == "timed_out"
    os.kill(peer.averager_pid, signal.SIGCONT)


def test_of_searches_that_are_over_no_task_is_left(swarm):
    peers = swarm.start(2, faults=dict.fromkeys(range(2), "counting"))
    for round in range(2):
        for peer in peers:
            peer.submit(np.zeros(1000), round=round)
        outcomes = [peer.outcome() for peer in peers]
        assert statuses(outcomes) == ["complete"] * 2, reasons(outcomes)
        assert [outcome["detail"] for outcome in outcomes] == ["0", "0"]  # one of them has led
