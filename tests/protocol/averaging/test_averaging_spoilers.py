"""Members that keep rounds from completing, over real all-reduces on loopback: what it costs the others."""

from __future__ import annotations

import numpy as np
from averaging_swarm import reasons, statuses


def test_who_dies_while_all_wait_for_an_average_takes_nobody_along(swarm):
    """Its stream ends where the reducer waits for the last one's part: the others' streams go on."""
    peers = swarm.start(3, sizes=(3000,), faults={1: "late", 2: "dies"})
    for peer in peers:
        peer.submit(np.ones(3000), expected=3, quorum=3)
    assert peers[2].next("error")[0] == "AveragerEnded"
    outcomes = [peer.outcome() for peer in peers[:2]]
    assert statuses(outcomes) == ["partial"] * 2, reasons(outcomes)
    assert all(set(outcome["failed"]) == {peers[2].peer_id} for outcome in outcomes), reasons(outcomes)
