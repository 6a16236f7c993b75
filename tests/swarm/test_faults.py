"""Helper processes die, invites are wrong: a peer mends itself, or ends with the reason. It never hangs."""

import signal
import socket
import time
from collections.abc import Iterator

import pytest
from harness import START_SECONDS, Peer, Swarm, backed_up, lost, owned_once, run_id_of
from shoal.protocol.identity import Identity

LEASE = 4.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """One bootstrap peer for all tests here."""
    with Swarm(tmp_path_factory.mktemp("faults")) as swarm:
        swarm.found("--steps", "100000", "--min-composers", "2", "--lease-seconds", str(LEASE))
        yield swarm


def test_a_peer_outlives_its_helper_processes(founded: Swarm) -> None:
    swarm = founded
    a, b = both = [swarm.join(name, "--data-shard", f"{index}/2") for index, name in enumerate("ab")]
    swarm.wait_for(
        "both train and merge",
        lambda: all(peer.phase == "training" and peer.commits() > 1 for peer in both) and owned_once(both),
        START_SECONDS,
    )

    # The transport is replaced; gossip, fetches and rounds go on.
    host = a.child("transport")
    received = _received(a, "delta-batch")
    host.kill()
    swarm.wait_for("a has another transport", lambda: a.status()["transport_restarts"] == 1, 30)
    swarm.wait_for("stand-ins reach a", lambda: _received(a, "delta-batch") > received, 30)
    received = _received(b, "delta-batch")
    swarm.wait_for("stand-ins of a reach b", lambda: _received(b, "delta-batch") > received, 30)
    commits = a.commits()
    swarm.wait_for("rounds go on", lambda: a.commits() > commits, 30)
    assert a.child("transport").pid != host.pid
    swarm.wait_for("every slot has one owner", lambda: owned_once(both), 3 * LEASE)
    assert lost(both) == 0

    # Without its averager a peer could train, but never merge; without its directory it is alone. It starts over in
    # place: same process, same ports, from a checkpoint that it writes first.
    for peer, helper, reason in (
        (b, "averager", "the averager process ended"),
        (a, "dht", "the DHT process has ended"),
    ):
        swarm.wait_for("every slot has a copy", lambda: backed_up(both) and owned_once(both), 60)
        before = peer.status()
        peer.child(helper).kill()
        swarm.wait_for("it starts over", lambda peer=peer: bool(peer.said("peer.starts_over")), 30)
        assert reason in peer.said("peer.starts_over")[-1]["reason"]
        swarm.wait_for(
            "it trains and merges",
            lambda peer=peer, before=before: (
                bool(peer.said("checkpoint.restored"))
                and peer.phase == "training"
                and peer.last["invite"] == before["invite"]
                and peer.commits() > 0
                and owned_once(both)
            ),
            START_SECONDS,
        )
        assert peer.said("checkpoint.restored")[-1]["step"] >= before["step"]
        assert lost(both) == 0
    assert b.said("peer.starts_over")[0]["times"] == 1

    # So does the peer that the invite leads to, wherever it stands in the line of its helpers.
    bootstrap = swarm.peers[0]
    bootstrap.child("p2pd").kill()
    swarm.wait_for("the bootstrap starts over", lambda: bool(bootstrap.said("peer.starts_over")), 30)
    swarm.wait_for("it is back", lambda: bootstrap.phase == "ready", START_SECONDS)
    assert bootstrap.last["invite"] == swarm.invite

    swarm.stop([b])
    swarm.wait_for("a owns everything", lambda: owned_once([a]), 3 * LEASE)

    # Told to stop while it catches up, a peer has nothing to hand over and leaves at once.
    b = swarm.join("b", "--data-shard", "1/2")
    swarm.wait_for("b syncs", lambda: b.phase == "syncing", START_SECONDS)
    b.signal(signal.SIGTERM)
    assert b.wait(15) == 0, b.tail()
    swarm.wait_for("a owns everything", lambda: owned_once([a]), 3 * LEASE)

    # Two that once were in step, then one alone for longer than any vote lives: they must find each other again.
    alone = a.status()["outer"]["last"]  # which failed for want of company
    b = swarm.join("b", "--data-shard", "1/2")
    swarm.wait_for(
        "b merges again",
        lambda: (
            b.commits() > 0
            and b.last["outer"]["held"][alone["fragment"]]["round"] >= alone["round"]
            and owned_once([a, b])
        ),
        START_SECONDS,
    )


def test_invites_that_lead_nowhere_say_so(founded: Swarm) -> None:
    swarm = founded
    began = time.monotonic()
    invite = swarm.invite.replace("/tiny-", "/other-")
    result = swarm.call("join", invite, "--data-dir", str(swarm.folder / "x"), "--join-seconds", "3")
    assert result.returncode == 1
    assert "do not know the run other-" in result.stderr
    assert "fix: check the invite" in result.stderr
    assert "Traceback" not in result.stderr

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        port = closed.getsockname()[1]
        invite = f"shoal://{Identity.generate().peer_id}@127.0.0.1:{port}/{run_id_of(swarm.invite)}?v=1"
        result = swarm.call("join", invite, "--data-dir", str(swarm.folder / "x"), "--join-seconds", "2")
    assert result.returncode == 1
    assert f"127.0.0.1 port {port}: Connection refused" in result.stderr
    assert "fix: " in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < START_SECONDS


def _received(peer: Peer, kind: str) -> float:
    return sum(
        entry["bytes"] for entry in peer.status()["bytes"] if entry["kind"] == kind and entry["direction"] == "in"
    )
