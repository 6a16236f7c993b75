"""Composers that own nothing and workers that see no text: together they train every expert."""

import signal

import pytest
from harness import START_SECONDS, Swarm, backed_up, lost, owned_once
from shoal.protocol.experts.auditing import LIES

LEASE = 4.0

pytestmark = pytest.mark.timeout(400)


def test_all_experts_live_on_workers(swarm: Swarm) -> None:
    swarm.found(
        "--steps", "100000", "--min-composers", "2", "--lease-seconds", str(LEASE),
        "--set", "trust.audit_every=10", "--set", "sketch.codec=int4",
    )  # fmt: skip
    first = swarm.join("w1", "--role", "worker")
    composers = [swarm.join(name, "--own", "none", "--data-shard", f"{i}/2") for i, name in enumerate("ab")]
    swarm.wait_for(
        "the worker learns from both",
        lambda: first.phase == "training" and owned_once([first]) and all(p.commits() > 0 for p in composers),
        START_SECONDS,
    )
    before = first.status()
    swarm.wait_for(
        "its stand-ins reach the composers, whose loss falls",
        lambda: all(0 < (p.status()["loss"] or 9.0) < 4.0 for p in composers) and first.status()["step"] > 60,
        90,
    )
    assert first.last["tokens"] == 0
    assert first.last["sketch_rows"]["in"] > before["sketch_rows"]["in"]
    assert first.last["fidelity"]
    assert all(not p.last["slots"]["owned"] for p in composers)
    swarm.wait_for(
        "audits of it pass", lambda: all(p.status()["audits"].get("passed", 0) >= 3 for p in composers), START_SECONDS
    )

    # A second worker is handed its share, and each keeps copies for the other. It trains low-rank factors only.
    idle = swarm.join("w3", "--role", "worker", "--expert-mode", "frozen")
    second = swarm.join("w2", "--role", "worker", "--expert-mode", "lora", "--lora-rank", "8")
    both = [first, second]
    swarm.wait_for(
        "the second worker has its share, and every slot a copy",
        lambda: len(second.epochs()) >= 6 and owned_once(both) and backed_up(both) and second.phase == "training",
        START_SECONDS,
    )
    assert idle.wait(START_SECONDS) == 2, "it would be taken for a liar"
    assert "audits its workers" in idle.tail()
    step, passed = second.status()["step"], [p.status()["audits"].get("passed", 0) for p in composers]
    swarm.wait_for(
        "it trains them, and audits pass",
        lambda: (
            second.status()["step"] > step + 20
            and all(p.status()["audits"].get("passed", 0) > n + 2 for p, n in zip(composers, passed, strict=True))
        ),
        60,
    )
    second.signal(signal.SIGKILL)
    swarm.wait_for("the first takes over", lambda: owned_once([first]), 2 * LEASE + 2)
    assert lost([first]) == 0
    assert not any(LIES & p.status()["audits"].keys() for p in composers)

    # Nobody is left to take its experts: it writes them down, and brings them back.
    orphaned, step = first.epochs(), first.status()["step"]
    first.signal(signal.SIGTERM)
    assert first.wait(30) == 0, first.tail()
    again = swarm.join("w1", "--role", "worker")
    swarm.wait_for("it owns and trains them again", lambda: owned_once([again]) and again.phase == "training", 60)
    [restored] = again.said("checkpoint.restored")
    assert restored["step"] >= step
    assert sorted(restored["slots"]) == list(range(16))
    assert all(epoch > orphaned[slot] for slot, epoch in again.epochs().items())
    assert lost([again]) == 0
    swarm.wait_for("training goes on", lambda: again.status()["step"] > step + 20, 60)
    assert not any(LIES & p.status()["audits"].keys() for p in composers)

    # As a composer on the same directory it passes over what it wrote as a worker.
    again.signal(signal.SIGTERM)
    assert again.wait(60) == 0, again.tail()
    composer = swarm.join("w1")
    swarm.wait_for("it composes", lambda: composer.phase == "training" and owned_once([composer]), START_SECONDS)
    assert composer.said("checkpoint.skipped")
    assert not composer.said("checkpoint.restored")
