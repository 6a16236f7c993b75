"""When a connection through a relay is tried to be replaced again."""

from __future__ import annotations

from shoal.node.peer.way_out import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Pauses


def test_pauses_double_and_those_of_peers_that_are_gone_are_forgotten() -> None:
    pauses, now, waited = Pauses(), 50.0, []
    assert pauses.over("a", now)
    for _ in range(6):
        pauses.begin("a", now)
        began = now
        while not pauses.over("a", now):
            now += FIRST_PAUSE_SECONDS / 2
        waited.append(now - began)
    assert waited == [60, 120, 240, 480, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS]
    for number in range(1000):
        pauses.begin(f"passer-by {number}", now)
        pauses.forget_all_but({"a": None})
    pauses.begin("b", now)
    assert len(pauses) == 2
    assert pauses.over("passer-by 3", now)
