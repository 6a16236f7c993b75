"""A peer that sleeps, as a laptop whose lid is closed: it comes back by itself, and says nothing that is not so."""

import time

import psutil
import pytest
from harness import START_SECONDS, Swarm, backed_up, lost, owned_once

LEASE = 4.0
ASLEEP_SECONDS = 25.0  # longer than anything else keeps a peer from looking at its clocks

pytestmark = pytest.mark.timeout(300)


def test_a_peer_that_slept_goes_on_where_the_others_are(swarm: Swarm) -> None:
    founder = swarm.found("--steps", "100000", "--min-composers", "2", "--lease-seconds", str(LEASE))
    peers = a, b, c = [swarm.join(name, "--data-shard", f"{n}/3") for n, name in enumerate("abc")]
    swarm.wait_for(
        "they merge, and every slot has a copy",
        lambda: all(p.commits() > 0 for p in peers) and owned_once(peers) and backed_up(peers),
        2 * START_SECONDS,
    )
    before, woken = a.status()["step"], [psutil.Process(a.process.pid), *a.children()]
    for process in woken:
        process.suspend()
    asleep_until = time.monotonic() + ASLEEP_SECONDS
    swarm.wait_for(
        "b and c have its slots, and go on",
        lambda: (
            time.monotonic() > asleep_until
            and owned_once([b, c])
            and min(p.status()["step"] for p in (b, c)) > before + 50
        ),
        120,
    )
    there, merged = min(b.last["step"], c.last["step"]), a.last["outer"]["rounds"]["committed"]
    for process in reversed(woken):
        process.resume()
    swarm.wait_for(
        "a is where the others are, has its share, and merges",
        lambda: a.status()["step"] > there and bool(a.epochs()) and owned_once(peers) and a.commits() > merged,
        120,
    )
    assert a.said("asleep or hung")
    assert a.said("joining.late")[-1]["step"] >= there, "its learning rate is not the others'"
    for peer in (founder, *peers):
        assert not peer.said("clock.off"), f"{peer.name} takes its clock for wrong"
        assert not peer.said("peer.clock_off"), f"{peer.name} takes another's clock for wrong"
        assert peer.status()["last_error"] is None
    assert lost(peers) == 0
