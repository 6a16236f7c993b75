"""Whom a peer remembers to have met."""

import json
from pathlib import Path

import pytest
from shoal.node.storage.known_peers import MAX_PEERS, KnownPeers
from shoal.protocol.identity import Identity

RUN = "demo-0123456789ab"


def someone(port: int = 4001) -> tuple[str, list[str]]:
    peer = Identity.generate().peer_id
    return peer, [f"/ip4/192.0.2.7/tcp/{port}/p2p/{peer}"]


def test_a_later_life_knows_them_the_last_seen_first(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path, RUN)
    assert known.addresses() == []
    (a, at_a), (b, at_b) = someone(), someone()
    known.meet({a: at_a})
    known.meet({b: at_b})
    known.meet({})  # all are gone: that is when they are needed
    assert KnownPeers(tmp_path, RUN).peers == {b: at_b, a: at_a}
    assert KnownPeers(tmp_path, RUN).addresses() == [*at_b, *at_a]
    assert KnownPeers(tmp_path, "other-0123456789ab").addresses() == []


def test_a_peer_that_moved_is_where_it_was_seen_last(tmp_path: Path) -> None:
    peer, before = someone()
    known = KnownPeers(tmp_path, RUN)
    known.meet({peer: before})
    after = [before[0].replace("4001", "4002")]
    known.meet({peer: after})
    assert KnownPeers(tmp_path, RUN).peers == {peer: after}


def test_addresses_that_cannot_be_dialled_or_are_anothers_are_left_out(tmp_path: Path) -> None:
    (peer, good), (_, anothers) = someone(), someone()
    known = KnownPeers(tmp_path, RUN)
    known.meet({peer: ["/ip4/999.0.0.1/tcp/0", *anothers, *good], "nobody": []})
    assert known.peers == {peer: good}


def test_it_remembers_so_many(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path, RUN)
    met = [someone() for _ in range(MAX_PEERS + 3)]
    for peer, addresses in met:
        known.meet({peer: addresses})
    assert list(KnownPeers(tmp_path, RUN).peers) == [peer for peer, _ in reversed(met[3:])]


def test_a_swarm_of_more_peers_is_not_written_down_again_and_again(tmp_path: Path) -> None:
    known, met = KnownPeers(tmp_path, RUN), dict(someone() for _ in range(MAX_PEERS + 3))
    known.meet(met)
    [written] = tmp_path.iterdir()
    written.unlink()
    known.meet(met)
    assert not written.exists()
    moved, before = list(met.items())[-1]
    known.meet({**met, moved: [before[0].replace("4001", "4002")]})
    assert written.exists()


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"a": 1}', json.dumps({"a": ["/ip4/1.2.3.4"]})])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damaged: str) -> None:
    (tmp_path / f"known-peers-{RUN}.json").write_text(damaged)
    known = KnownPeers(tmp_path, RUN)
    assert known.addresses() == []
    peer, addresses = someone()
    known.meet({peer: addresses})
    assert KnownPeers(tmp_path, RUN).peers == {peer: addresses}
