"""Composers of two processes, one in each form, in one swarm: they merge, and losing a process costs none of them."""

from pathlib import Path

import pytest
from harness import START_SECONDS, Peer, Swarm, owned_once
from shoal.node.model.presets import preset

pytestmark = pytest.mark.timeout(400)

BATCH_SIZE = 2
FORMS: dict[str, tuple[tuple[str, ...], int]] = {  # and how many batches a step has
    "data": ((), 2),
    "learners": (("--island-every", "4"), 2),
    "pipeline": (("--island-form", "pipeline"), 1),
}


def test_islands_are_peers_and_outlive_their_members(swarm: Swarm) -> None:
    swarm.found(
        "--steps", "100000", "--min-composers", "3", "--lease-seconds", "4", "--set", f"train.batch_size={BATCH_SIZE}"
    )
    islands = [
        swarm.join(name, "--data-shard", f"{shard}/3", "--island", "2", *form)
        for shard, (name, (form, _)) in enumerate(FORMS.items())
    ]
    swarm.wait_for(
        "all train and merge, each with its slots",
        lambda: all(it.phase == "training" and it.commits() > 1 for it in islands) and owned_once(islands),
        2 * START_SECONDS,
    )
    batch = BATCH_SIZE * preset("tiny").data.context_length
    for island, (_, batches) in zip(islands, FORMS.values(), strict=True):
        assert island.status()["processes"] == 2
        assert 0.75 * batches < _tokens_a_step(island) / batch < 1.25 * batches
        composers = [seen for seen in island.status()["peers"] if seen["role"] == "composer"]
        assert len(composers) == len(islands), "members are no peers"
    swarm.wait_for("owners learn from them", lambda: all(_rows_sent(it) > 0 for it in islands), 30)

    for island in islands:
        island.child("member").kill()
    swarm.wait_for("they go on alone", lambda: all(bool(it.said("island.lost")) for it in islands), 30)
    commits = [it.commits() for it in islands]
    swarm.wait_for("and merge", lambda: all(it.commits() > n for it, n in zip(islands, commits, strict=True)), 60)
    swarm.wait_for("members are replaced", lambda: all(len(it.said("island.formed")) == 2 for it in islands), 60)
    swarm.wait_for("they compute together", lambda: all(it.status()["processes"] == 2 for it in islands), 30)
    assert owned_once(islands)
    for island in islands:
        assert "too-many-tokens" not in str(island.status()["sketches_lost"]), "owners take what it sends"

    members = [island.child("member") for island in islands]
    assert set(swarm.stop(islands).values()) == {0}
    assert not any(Path(f"/proc/{member.pid}").exists() for member in members)


def _tokens_a_step(peer: Peer) -> float:
    status = peer.status()
    return float(status["tokens"]) / float(status["step"])


def _rows_sent(peer: Peer) -> float:
    rows = peer.status()["sketch_rows"]
    return float(rows.get("out", 0)) if isinstance(rows, dict) else 0.0
