"""A composer of two processes in a swarm with one of one: they merge, and losing a process costs it nothing."""

from pathlib import Path

import pytest
from harness import START_SECONDS, Peer, Swarm, owned_once

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("form", "batches"),
    [((), 2), (("--island-every", "4"), 2), (("--island-form", "pipeline"), 1)],
    ids=["data", "learners", "pipeline"],
)
def test_an_island_is_one_peer_and_outlives_its_members(form: tuple[str, ...], batches: int, tmp_path: Path) -> None:
    with Swarm(tmp_path) as swarm:
        swarm.found("--steps", "100000", "--min-composers", "2", "--lease-seconds", "4")
        island = swarm.join("island", "--data-shard", "0/2", "--island", "2", *form)
        plain = swarm.join("plain", "--data-shard", "1/2")
        both = [island, plain]
        swarm.wait_for(
            "both train and merge, each with its slots",
            lambda: all(peer.phase == "training" and peer.commits() > 1 for peer in both) and owned_once(both),
            START_SECONDS,
        )
        assert island.status()["processes"] == 2
        assert 0.75 * batches < _tokens_a_step(island) / _tokens_a_step(plain) < 1.25 * batches
        assert len([seen for seen in island.status()["peers"] if seen["role"] == "composer"]) == 2, (
            "members are no peers"
        )
        swarm.wait_for("owners learn from it", lambda: _rows_sent(island) > 0, 30)

        member = island.child("member")
        member.kill()
        swarm.wait_for("it goes on alone", lambda: bool(island.said("island.lost")), 30)
        commits = island.commits()
        swarm.wait_for("and merges", lambda: island.commits() > commits, 30)
        swarm.wait_for("the member is replaced", lambda: len(island.said("island.formed")) == 2, 60)
        swarm.wait_for("they compute together", lambda: island.status()["processes"] == 2, 30)
        assert owned_once(both)
        assert "too-many-tokens" not in str(island.status()["sketches_lost"]), "owners take what it sends"

        member = island.child("member")
        assert set(swarm.stop(both).values()) == {0}
        assert not Path(f"/proc/{member.pid}").exists()


def _tokens_a_step(peer: Peer) -> float:
    status = peer.status()
    return float(status["tokens"]) / float(status["step"])


def _rows_sent(peer: Peer) -> float:
    rows = peer.status()["sketch_rows"]
    return float(rows.get("out", 0)) if isinstance(rows, dict) else 0.0
