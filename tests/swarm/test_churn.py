"""Peers come late, die, come back and leave, and the swarm trains on without losing anything.

One swarm lives through it all, stage after stage: starting peers is what takes the time.
"""

import math
import os
import random
import signal

import psutil
import pytest
from harness import START_SECONDS, Peer, Swarm, backed_up, loss_of, lost, owned_once
from shoal.protocol.experts.ownership import COPY_RAISE

LEASE = 4.0
SLACK = 2.0  # for a busy machine, on top of what the protocol promises
CHECKPOINT_EVERY = 20

pytestmark = pytest.mark.timeout(400)


def test_a_swarm_outlives_its_peers(swarm: Swarm) -> None:
    swarm.found("--steps", "100000", "--min-composers", "2", "--lease-seconds", str(LEASE))
    a, b = [start(swarm, name) for name in "ab"]
    swarm.wait_for(
        "a and b have learned something",
        lambda: all(p.status().get("step", 0) > 60 and p.commits() > 2 for p in (a, b)) and owned_once([a, b]),
        START_SECONDS,
    )
    c = comes_late(swarm, a, b)
    dies(swarm, a, b, c)
    c = comes_back(swarm, a, b, c)
    leaves(swarm, a, b, c)
    all_die(swarm, a, b)


def start(swarm: Swarm, name: str) -> Peer:
    shard = f"{'abc'.index(name)}/3"
    return swarm.join(name, "--data-shard", shard, "--checkpoint-every", str(CHECKPOINT_EVERY))


def comes_late(swarm: Swarm, a: Peer, b: Peer) -> Peer:
    """A newcomer starts where the swarm is, as good as the swarm is, and takes its share of slots."""
    before = a.epochs() | b.epochs()
    c = start(swarm, "c")
    phases: list[str] = []

    def trains() -> bool:
        told = c.status()
        phases.append(told.get("phase", ""))
        return told.get("phase") == "training" and told["steps_done"] > 0

    swarm.wait_for("c trains", trains, START_SECONDS)
    assert "syncing" in phases
    history = c.status()["history"]
    [late] = c.said("joining.late")
    assert late["step"] >= 60
    assert history["step"][0] == late["step"] + 1
    assert history["loss"][0] < as_good_as(a), "the newcomer's first loss is not the swarm's"
    swarm.wait_for("c has its share", lambda: len(c.epochs()) >= 4 and owned_once([a, b, c]), 6 * LEASE)
    assert all(epoch > before[slot] for slot, epoch in c.epochs().items())
    assert lost([a, b, c]) == 0
    swarm.wait_for("c merges", lambda: c.commits() > 1, 60)
    return c


def dies(swarm: Swarm, a: Peer, b: Peer, c: Peer) -> None:
    """SIGKILL: the standbys take over from their copies within two leases, and nothing stays behind."""
    step = c.last["step"]
    swarm.wait_for(
        "every slot has a copy, and c a checkpoint with its slots",
        lambda: (
            backed_up([a, b, c]) and owned_once([a, b, c]) and (c.status()["checkpoint"] or {"step": 0})["step"] > step
        ),
        60,
    )
    orphaned, below, commits = c.epochs(), c.children(), (a.commits(), b.commits())
    assert orphaned
    c.signal(signal.SIGKILL)
    seconds = swarm.wait_for("a and b own everything", lambda: owned_once([a, b]), 2 * LEASE + SLACK)
    print(f"taken over after {seconds:.1f} s, the lease being {LEASE} s")
    epochs = a.epochs() | b.epochs()
    assert all(epochs[slot] > epoch for slot, epoch in orphaned.items()), (orphaned, epochs)
    assert lost([a, b]) == 0
    assert c.wait(5) == -signal.SIGKILL
    swarm.wait_for("c left no process", lambda: not any(alive(process) for process in below), 10)
    swarm.wait_for(
        "training and outer commits go on with two",
        lambda: a.commits() > commits[0] + 1 and b.commits() > commits[1] + 1,
        60,
    )


def comes_back(swarm: Swarm, a: Peer, b: Peer, c: Peer) -> Peer:
    """On its old data directory it is the same peer, goes on from its checkpoint, and catches up."""
    identity, died_at = c.id, c.last["step"]
    behind = min(a.status()["step"], b.status()["step"])
    c = start(swarm, "c")
    swarm.wait_for("c trains again", lambda: c.phase == "training" and c.last["steps_done"] > 0, START_SECONDS)
    assert c.id == identity
    [restored] = c.said("checkpoint.restored")
    assert 0 < restored["step"] <= died_at + CHECKPOINT_EVERY
    assert restored["slots"]  # which others own by now, at a higher epoch
    history = c.status()["history"]
    assert history["step"][0] > behind  # where the swarm is, not where it died
    assert history["loss"][0] < as_good_as(a)
    swarm.wait_for("c owns slots again", lambda: len(c.epochs()) >= 4 and owned_once([a, b, c]), 6 * LEASE)
    swarm.wait_for("c merges again", lambda: c.commits() > 0, 60)
    assert lost([a, b, c]) == 0
    return c


def leaves(swarm: Swarm, a: Peer, b: Peer, c: Peer) -> None:
    """Ctrl-C, or its terminal is closed: it hands all over and exits with 0; nobody waits for a lease to run out."""
    given, steps = c.epochs(), (a.status()["step"], b.status()["step"])
    commits = a.commits(), b.commits()
    number = random.choice([signal.SIGINT, signal.SIGHUP])
    print(f"c gets a {number.name}")
    os.killpg(c.process.pid, number)  # as a terminal does it: its helpers get it too
    if number == signal.SIGHUP:
        os.killpg(c.process.pid, number)  # the shell sends one, and the terminal another
    assert c.wait(30) == 0, c.tail()
    assert {entry["slot"] for entry in c.said("slot.released")} >= set(given)
    swarm.wait_for("a and b own everything", lambda: owned_once([a, b]), SLACK)
    epochs = a.epochs() | b.epochs()
    assert all(epochs[slot] == epoch + COPY_RAISE for slot, epoch in given.items()), (given, epochs)
    assert lost([a, b]) == 0
    assert list((c.folder / "checkpoints").glob("*/*/state.safetensors"))
    assert not (c.folder / "peer.json").exists()
    swarm.wait_for(
        "training and outer commits go on with two",
        lambda: (
            a.commits() > commits[0] + 1
            and b.commits() > commits[1] + 1
            and a.last["step"] > steps[0] + 10
            and b.last["step"] > steps[1] + 10
        ),
        60,
    )


def all_die(swarm: Swarm, a: Peer, b: Peer) -> None:
    """As when the power fails, and one never returns: its slots go on from the copies on the other's disk."""
    step = b.status()["step"]
    swarm.wait_for(
        "every slot has a copy, and b a checkpoint with its slots",
        lambda: backed_up([a, b]) and owned_once([a, b]) and (b.status()["checkpoint"] or {"step": 0})["step"] > step,
        60,
    )
    orphaned = a.epochs()
    assert orphaned
    for peer in (a, b):
        peer.signal(signal.SIGKILL)
    assert [peer.wait(5) for peer in (a, b)] == [-signal.SIGKILL] * 2
    b, c = start(swarm, "b"), start(swarm, "c")
    swarm.wait_for("b and c own everything", lambda: owned_once([b, c]), START_SECONDS + 4 * LEASE)
    epochs = b.epochs() | c.epochs()
    assert min(epochs.values()) > 1, "a slot began anew"
    assert lost([b, c]) == 0
    assert {entry["slot"] for peer in (b, c) for entry in peer.said("slot.taken_over")} >= set(orphaned)
    swarm.wait_for("both train", lambda: all(peer.phase == "training" for peer in (b, c)), 60)


def as_good_as(peer: Peer) -> float:
    """A loss, in nats, that one batch of a model like `peer`'s stays below, and one that knows nothing does not."""
    return (loss_of(peer.status()) + math.log(256)) / 2


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
