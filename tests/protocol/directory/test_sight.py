"""A peer that lost sight of its swarm says so; one whose neighbours left, or that was always alone, does not."""

import pytest
from shoal.protocol.directory.records import PeerRecord, Role
from shoal.protocol.directory.sight import Sight, sight_of
from shoal.protocol.directory.view import View, resolve

NOW = 1000.0
ME, FRIENDS = "12D3KooW" + "M" * 44, ["12D3KooW" + letter * 44 for letter in "ABCDE"]


def peer(name: str, *, live: bool, role: Role = "composer", phase: str = "training") -> PeerRecord:
    return PeerRecord(
        peer_id=name, role=role, phase=phase, capacity=4, transport_addrs=[], dht_addrs=[], metrics_url="", version="",
        protocol_version=1, step=1, tokens=0, tokens_per_second=0.0, loss=0.0, slots=[], round=0, fidelity=0.0,
        issued_at=NOW - 20, expires_at=NOW + 10 if live else NOW - 5,
    )  # fmt: skip


def view_of(*others: PeerRecord) -> View:
    return resolve(NOW, peers=[peer(ME, live=True), *others], leases=[], votes=[], strongest={})


@pytest.mark.parametrize(
    ("live", "silent", "cut_off"),
    [(0, 0, False), (0, 1, True), (1, 1, False), (1, 2, True), (2, 2, False), (2, 3, True), (3, 2, False)],
)
def test_who_sees_no_majority_of_those_it_knows_is_cut_off(live: int, silent: int, cut_off: bool) -> None:
    others = [peer(name, live=index < live) for index, name in enumerate(FRIENDS[: live + silent])]
    sight = sight_of(view_of(*others), ME, [])
    assert sight == Sight(live=live, connected=0, silent=silent)
    assert sight.cut_off is cut_off


@pytest.mark.parametrize("phase", ["leaving", "stopped", "failed"])
def test_who_said_goodbye_is_not_missed(phase: str) -> None:
    others = [peer(name, live=False, phase=phase) for name in FRIENDS]
    assert not sight_of(view_of(*others), ME, []).cut_off


def test_who_only_looks_does_not_count() -> None:
    others = [peer(FRIENDS[0], live=True), *(peer(name, live=False, role="observer") for name in FRIENDS[1:])]
    assert sight_of(view_of(*others), ME, []) == Sight(live=1, connected=0, silent=0)


def test_connections_to_strangers_are_not_the_swarms() -> None:
    others = [peer(FRIENDS[0], live=True), peer(FRIENDS[1], live=True), peer(FRIENDS[2], live=False)]
    assert sight_of(view_of(*others), ME, [FRIENDS[0], FRIENDS[2], FRIENDS[4]]).connected == 1
