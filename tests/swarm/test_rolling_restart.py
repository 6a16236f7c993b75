"""`deploy/rolling_restart` takes a whole swarm through an upgrade: real peers, each stopped and started once."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import restart
from harness import DIRECT, SHOAL, START_SECONDS, Peer, Swarm, backed_up, owned_once
from prometheus_server import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "rolling_restart"
LEASE = 4.0

pytestmark = pytest.mark.timeout(400)


def argument(peer: Peer, command: list[str]) -> str:
    """How the script is told of a peer: its URL and what restarts it."""
    again = [*command, "--host", "127.0.0.1", "--data-dir", str(peer.folder), "--log-format", "json"]
    log = peer.log.with_suffix(".again.log")
    return shlex.join([peer.url, sys.executable, restart.__file__, str(peer.folder), str(log), str(SHOAL), *again])


def told(peer: Peer) -> dict[str, Any]:
    """What the peer in this one's place says."""
    with DIRECT.open(f"{peer.url}/status.json", timeout=10) as answer:
        status: dict[str, Any] = json.load(answer)
    return status


def updates(statuses: list[dict[str, Any]]) -> dict[int, int]:
    return {lease["slot"]: lease["updates"] for status in statuses for lease in status["slots"]["leases"]}


def test_no_expert_loses_a_step(swarm: Swarm) -> None:
    def listening() -> list[str]:
        return ["--http-port", str(free_port())]

    facts = ["--steps", "100000", "--min-composers", "2", "--lease-seconds", str(LEASE)]
    founding = ["--role", "composer", "--threads", "1", "--dht-port", str(free_port()), *listening()]
    founder = swarm.found(*facts, *founding)
    joining = ["join", swarm.invite, "--threads", "1", "--data-shard", "1/2", *listening()]
    peers = [founder, swarm.start("joiner", *joining)]
    swarm.wait_for(
        "both train, and every slot has a copy",
        lambda: all(peer.commits() > 1 for peer in peers) and owned_once(peers) and backed_up(peers),
        START_SECONDS,
    )
    before = updates([told(peer) for peer in peers])
    assert sorted(before) == list(range(16))
    assert all(before.values())

    commands = ["found", "--preset", "tiny", *founding], joining
    done = subprocess.run(
        [str(SCRIPT), *(argument(peer, command) for peer, command in zip(peers, commands, strict=True))],
        env=swarm.environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, f"{done.stderr}\n{swarm.report()}"
    assert "all 2 peers are back; no slot has lost a step" in done.stdout

    assert [peer.wait(1) for peer in peers] == [0, 0]
    statuses = [told(peer) for peer in peers]
    assert all(status["in_the_run"] and status["slots"]["lost"] == 0 for status in statuses)
    after = updates(statuses)
    assert all(after[slot] > count for slot, count in before.items()), (before, after)
    assert statuses[0]["run_id"] == peers[0].last["run_id"]
    for peer in reversed(peers):
        restart.stop(peer.folder)
