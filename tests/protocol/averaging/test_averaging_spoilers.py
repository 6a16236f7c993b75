"""Members that keep rounds from completing, over real all-reduces on loopback: what it costs, and who is suspected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from averaging_swarm import reasons, statuses
from shoal.protocol.averaging.reputation import Reputation


def shunned(peer, outcome):
    """Whom this peer keeps out once there have been as many such rounds as it takes."""
    book = Reputation(peer.peer_id)
    for _ in range(6):
        book.failed(outcome["proven"], outcome["suspicion"], 0.0)
    return book.shunned(0.0)


def test_who_dies_while_all_wait_for_an_average_takes_nobody_along(swarm):
    """Its stream ends where the reducer waits for the last one's part: the others' streams go on."""
    peers = swarm.start(3, sizes=(3000,), faults={1: "late", 2: "dies"})
    for peer in peers:
        peer.submit(np.ones(3000), expected=3, quorum=3)
    assert peers[2].next("error")[0] == "AveragerEnded"
    outcomes = [peer.outcome() for peer in peers[:2]]
    assert statuses(outcomes) == ["partial"] * 2, reasons(outcomes)
    assert all(set(outcome["failed"]) == {peers[2].peer_id} for outcome in outcomes), reasons(outcomes)


def test_who_sends_its_parts_twice_is_found_out_and_not_who_comes_after_it(swarm):
    peers = swarm.start(3, sizes=(3000,), faults={1: "late", 2: "repeats"})
    for peer in peers:
        peer.submit(np.ones(3000), expected=3, quorum=3)
    outcomes = [peer.outcome() for peer in peers]
    first, late, liar = peers
    assert outcomes[0]["status"] != "complete", reasons(outcomes)
    assert outcomes[0]["proven"] == (liar.peer_id,)
    assert late.peer_id not in outcomes[0]["failed"]
    assert liar.peer_id in shunned(first, outcomes[0])
    for peer in (first, late):
        peer.submit(np.ones(3000), attempt=1, expected=2, avoid=[liar.peer_id])
    assert statuses([peer.outcome() for peer in (first, late)]) == ["complete"] * 2


@pytest.mark.parametrize("fault", ["mute", "babbles"])
def test_a_reducer_without_answers_is_suspected(swarm, fault):
    """As one whom nobody can dial: its own parts come, and every round would be tried again with it for ever."""
    peers = swarm.start(3, sizes=(3000,), faults={2: fault}, timeout_seconds=10.0)
    for peer in peers:
        peer.submit(np.ones(3000), expected=3, quorum=3)
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes[:2]) == ["partial"] * 2, reasons(outcomes)
    for peer, outcome in zip(peers[:2], outcomes, strict=False):
        assert set(outcome["failed"]) == {peers[2].peer_id}, reasons(outcomes)
        assert shunned(peer, outcome) == {peers[2].peer_id}


def test_who_is_too_slow_for_the_round_is_suspected(swarm, tmp_path):
    """Its link carries a part in time, but not all of them: rounds with it always end before it has sent them."""
    peers = swarm.start(
        3, sizes=(24_000,), part_bytes=1 << 12, timeout_seconds=16.0, paces={2: (str(tmp_path), 8000.0, None)}
    )
    for peer in peers:
        peer.submit(np.ones(24_000), expected=3, quorum=3)
    outcomes = [peer.outcome() for peer in peers]
    assert all(outcome["status"] != "complete" for outcome in outcomes), reasons(outcomes)
    for peer, outcome in zip(peers[:2], outcomes, strict=False):
        assert shunned(peer, outcome) == {peers[2].peer_id}, (outcome["suspicion"], reasons(outcomes))


def peak(peer):
    """The most memory that its averager has had, in bytes."""
    (line,) = (line for line in Path(f"/proc/{peer.averager_pid}/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])


def test_a_message_without_end_is_not_taken_in(swarm):
    victim, liar = swarm.start(2, faults={1: "floods"})
    before = peak(victim)
    for peer in (victim, liar):
        peer.submit(np.ones(1000))
    assert statuses([peer.outcome() for peer in (victim, liar)]) == ["complete"] * 2
    assert peak(victim) - before < 64 << 20
