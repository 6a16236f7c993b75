"""What `deploy/rolling_restart` takes for a loss, and how it is told of peers; tests/swarm restarts real ones."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from deployed import DEPLOY, peers
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import Count, Lease, PeerState, Phase

SCRIPT = DEPLOY / "rolling_restart"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("rolling_restart", str(SCRIPT))
    spec = importlib.util.spec_from_loader("rolling_restart", loader)
    assert spec is not None
    module = sys.modules["rolling_restart"] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Two:
    """Two peers that share four slots, and the script's view of them."""

    def __init__(self, script: ModuleType) -> None:
        self.states = {name: PeerState("composer", wall=lambda: 1.0) for name in "ab"}
        for name, slots in (("a", (0, 1)), ("b", (2, 3))):
            self.states[name].identify(slots_total=4)
            self.states[name].enter(Phase.TRAINING)
            self.holds(name, dict.fromkeys(slots, (1, 100)), standby=set(range(4)) - set(slots))
        self.swarm = script.Swarm([script.Peer(name, state.snapshot, []) for name, state in self.states.items()])
        self.swarm.look()

    def holds(self, name: str, slots: dict[int, tuple[int, int]], standby: set[int]) -> None:
        """By slot its epoch and updates."""
        leases = [Lease(slot=slot, epoch=epoch, version=0, updates=n) for slot, (epoch, n) in slots.items()]
        self.states[name].set_slots(leases=leases, standby=standby)


def test_a_handover_that_keeps_all_is_none(script: ModuleType) -> None:
    two = Two(script)
    assert two.swarm.missing() == ""
    two.holds("a", {}, standby=set())
    two.holds("b", {0: (2, 100), 1: (2, 101), 2: (1, 103), 3: (1, 100)}, standby=set())
    two.swarm.look()
    assert two.swarm.missing() == ""
    assert two.swarm.updates == {0: 100, 1: 101, 2: 103, 3: 100}


def test_a_slot_that_has_learned_less_is_a_loss(script: ModuleType) -> None:
    two = Two(script)
    two.holds("b", {0: (2, 99), 2: (1, 100), 3: (1, 100)}, standby=set())
    with pytest.raises(script.Stopped, match="slot 0 at b has had 99 updates, and had 100 before"):
        two.swarm.look()


def test_where_only_weights_travel_lost_slots_alone_are_a_loss(script: ModuleType) -> None:
    two = Two(script)
    two.swarm.weights_only = True
    two.holds("b", {0: (2, 0), 2: (1, 100), 3: (1, 100)}, standby=set())
    two.swarm.look()
    two.states["b"].count(Count.LOST_SLOTS)
    with pytest.raises(script.Stopped, match="b found no copy of a slot"):
        two.swarm.look()


def test_a_loss_while_a_peer_restarts_does_not_leave_it_down(script: ModuleType, tmp_path: Path) -> None:
    two = Two(script)
    peer = two.swarm.peers[0]
    peer.restart = ["sh", "-c", f"sleep {3 * script.POLL_SECONDS}; touch {tmp_path}/started"]
    two.holds("b", {0: (2, 99), 2: (1, 100), 3: (1, 100)}, standby=set())
    with pytest.raises(script.Stopped, match="slot 0 at b has had 99 updates"):
        two.swarm.restart(peer, 60.0)
    assert (tmp_path / "started").exists()


def test_what_a_deposed_owner_still_says_is_no_loss(script: ModuleType) -> None:
    two = Two(script)
    two.holds("b", {0: (2, 107), 2: (1, 100), 3: (1, 100)}, standby=set())
    two.swarm.look()
    two.swarm.look()
    assert two.swarm.missing() == "4 slots, of which 4 are owned, 1 twice"


def test_a_slot_without_any_copy_is_a_loss(script: ModuleType) -> None:
    two = Two(script)
    two.states["b"].count(Count.LOST_SLOTS)
    with pytest.raises(script.Stopped, match="b found no copy of a slot"):
        two.swarm.look()


def test_it_waits_for_owners_copies_and_peers(script: ModuleType) -> None:
    two = Two(script)
    two.holds("a", {0: (1, 100), 1: (1, 100)}, standby={3})
    two.swarm.look()
    assert two.swarm.missing() == "1 slots have no copy at a standby"
    two.holds("a", {0: (1, 100)}, standby={2, 3})
    two.swarm.look()
    assert two.swarm.missing() == "4 slots, of which 3 are owned, 0 twice"
    two.states["a"].enter(Phase.SYNCING)
    two.swarm.look()
    assert two.swarm.missing() == "not in the run: a"
    with pytest.raises(script.Stopped, match="not in the run: a, for 0 s"):
        two.swarm.settle(0.0, str)


def test_composed_peers_are_asked_and_restarted_by_docker(script: ModuleType) -> None:
    for name in peers():
        peer = script.peer_of(name, "deploy/compose.yaml", False)
        assert peer.restart[:4] == ["docker", "compose", "-f", "deploy/compose.yaml"]
        assert peer.restart[-1] == name


def test_peers_are_asked_directly_whatever_proxy_the_environment_names(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with StatusServer(PeerState("composer")) as server:
        assert script.peer_of(f"{server.url} true", None, False).ask()["role"] == "composer"


@pytest.mark.parametrize("wrong", [("--systemd", "shoal@a"), ("http://127.0.0.1:1",), ("shoal restart",)])
def test_peers_that_cannot_be_are_refused(wrong: tuple[str, ...]) -> None:
    done: Any = subprocess.run([str(SCRIPT), *wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert " is not " in done.stderr


def test_a_command_that_fails_ends_it(script: ModuleType) -> None:
    two = Two(script)
    two.swarm.peers[0].restart = ["false"]
    with pytest.raises(script.Stopped, match="a: false ended with exit code 1"):
        two.swarm.restart(two.swarm.peers[0], 10.0)
