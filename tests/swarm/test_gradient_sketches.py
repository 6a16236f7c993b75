"""A run whose worker lives on gradient sketches that composers average on their way: real processes."""

import pytest
from harness import START_SECONDS, Peer, Swarm, owned_once

EVERY = 8

pytestmark = pytest.mark.timeout(300)


def rounds(peer: Peer) -> int:
    """Slots' rounds that were complete for it."""
    return int(peer.status().get("sketch_rounds", {}).get("complete", 0))


def traffic(peer: Peer) -> dict[tuple[str, str], float]:
    return {(row["kind"], row["direction"]): row["bytes"] for row in peer.status()["bytes"]}


def test_a_worker_learns_from_averaged_gradients_and_from_a_latecomers_too(swarm: Swarm) -> None:
    settings = ("sketch.kind=gradient", f"sketch.gradient_every={EVERY}", "sketch.rank=16")
    swarm.found("--steps", "100000", "--lease-seconds", "6", *(f"--set={setting}" for setting in settings))
    worker = swarm.join("worker", "--role", "worker")
    first = swarm.join("a", "--own", "none", "--data-shard", "0/2")
    swarm.wait_for("a composer trains", lambda: first.phase == "training", START_SECONDS)
    second = swarm.join("b", "--own", "none", "--data-shard", "1/2")  # intervals have passed until it is there
    swarm.wait_for(
        "the worker learns",
        lambda: worker.phase == "training" and owned_once([worker]) and rounds(worker) >= 16,
        START_SECONDS,
    )
    swarm.wait_for("sketches arrive of both", lambda: min(rounds(first), rounds(second)) >= 16, START_SECONDS)
    swarm.wait_for(
        "the composers compute with what the worker has published",
        lambda: all(0 < (p.status()["loss"] or 9.0) < 4.0 for p in (first, second)),
        START_SECONDS,
    )
    told = worker.status()
    assert told["tokens"] == 0
    assert EVERY < told["step"] <= first.status()["step"]
    assert not told["sketch_rows"]
    assert traffic(worker)["delta-batch", "out"] > 0
    assert not worker.said("sketch.refused")
    for composer in (first, second):
        assert traffic(composer)["delta-batch", "in"] > 0
        # What a member sends is its input and the results of its share; in int8 a slot's vector has 21504 bytes.
        complete, sent = rounds(composer), traffic(composer)["gradient-sketch", "out"]
        tried = sum(composer.status()["sketch_rounds"].values())  # asked last: rounds go on meanwhile
        assert 20_000 * complete < sent < 35_000 * tried
        assert not composer.last["slots"]["owned"]
