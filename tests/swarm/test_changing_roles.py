"""A data directory that was a worker's is a composer's in the same run."""

import signal

import pytest
from harness import START_SECONDS, Swarm, owned_once

pytestmark = pytest.mark.timeout(300)


def test_who_was_a_worker_composes(swarm: Swarm) -> None:
    swarm.found("--steps", "100000", "--lease-seconds", "4")
    worker = swarm.join("a", "--role", "worker")
    composer = swarm.join("b", "--own", "none")
    swarm.wait_for(
        "the worker trains every expert", lambda: owned_once([worker]) and worker.status()["step"] > 5, START_SECONDS
    )
    worker.signal(signal.SIGTERM)
    assert worker.wait(60) == 0, worker.tail()
    assert worker.said("slot.not_taken"), "nobody can take its slots: they are in its checkpoint"

    again = swarm.join("a")
    swarm.wait_for("it composes", lambda: again.phase == "training" and owned_once([again]), START_SECONDS)
    assert again.said("checkpoint.skipped")
    assert not again.said("checkpoint.restored")
    assert composer.phase == "training"
