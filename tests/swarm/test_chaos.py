"""Networks that split and clocks that step: the majority goes on, who is cut off commits nothing and then catches up.

Peers are real and stand in network namespaces, by the harness of `./dev bench chaos`.
"""

import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from harness import wait_until
from shoal.benchmarks.chaos.network import NAMESPACES, Network, NetworkMissing
from shoal.benchmarks.chaos.peers import Peer, Peers
from shoal.benchmarks.chaos.swarm import wait

LEASE = 4.0
FOUND = (
    "found", "--role", "composer", "--preset", "tiny", "--steps", "100000", "--min-composers", "3",
    "--lease-seconds", str(LEASE), "--set", "train.batch_size=2", "--set", "outer.every_steps=8",
    "--set", "outer.matchmaking_seconds=2", "--set", "outer.timeout_seconds=10",
)  # fmt: skip

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def network() -> Iterator[Network]:
    """Namespaces; none of them, and nothing that ran in them, may be left."""
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Network())
        except NetworkMissing as error:
            pytest.skip(str(error))
        yield network
        for host in network.hosts:
            wait_until(partial(_nobody_in, network.namespace(host)), 10, f"processes of {host} are left over")
    assert not list(NAMESPACES.glob(f"{network.mark}*"))


def test_a_peer_that_was_cut_off_takes_what_the_majority_merged(network: Network, tmp_path: Path) -> None:
    with Peers(network, tmp_path) as peers:
        a = peers.add("a", FOUND)
        wait(peers, lambda: bool(a.status.get("invite")), "founding")
        b, c = (peers.add(name, ["join", a.status["invite"], "--data-shard", f"{i}/3"]) for i, name in enumerate("bc"))
        wait(peers, lambda: all(peer.commits > 1 for peer in (a, b, c)), "all merge")

        gone = random.choice(["partition", "interface down"])
        print(f"c is cut off: {gone}")
        if gone == "partition":
            network.partition(["c"], "cut")
        else:
            network.unplug("c")
        commits = a.commits, b.commits
        wait(peers, lambda: _went_on(a, b, commits, 2), "the majority merges without c")
        alone, step, fetched = c.held, c.status["step"], len(c.said("outer.refetched"))
        commits = a.commits, b.commits
        wait(peers, lambda: _went_on(a, b, commits, 4), "the majority goes on")
        wait(peers, lambda: c.status["step"] > step + 8, "c trains on")
        assert c.held == alone, "a peer alone has no quorum"
        wait(peers, lambda: c.status["sight"]["cut_off"], "c says that it is cut off")
        assert not a.status["sight"]["cut_off"]

        if gone == "partition":
            network.heal(["c"])
        else:
            network.plug("c")
        merged = max(round_ for round_, _ in a.held)
        wait(peers, lambda: len(c.said("outer.refetched")) > fetched, "c takes what was merged")
        wait(
            peers,
            lambda: len({tuple(peer.held) for peer in (a, b, c)}) == 1 and min(c.held)[0] >= merged - 1,
            "all hold the same",
        )
        commits = a.commits, c.commits
        wait(peers, lambda: _went_on(a, c, commits, 2), "all merge together again")
        wait(peers, lambda: not c.status["sight"]["cut_off"], "c sees them again")
        assert c.said("swarm.in_sight")
        assert not any(peers.leave().values())


def test_a_peer_whose_clock_steps_says_so_and_comes_back(network: Network, tmp_path: Path) -> None:
    with Peers(network, tmp_path) as peers:
        a = peers.add("a", FOUND)
        wait(peers, lambda: bool(a.status.get("invite")), "founding")
        join = ["join", a.status["invite"], "--data-shard"]
        b = peers.add("b", [*join, "1/3"])
        c = peers.add("c", [*join, "2/3"], own_clock=True)
        wait(peers, lambda: all(peer.commits > 1 for peer in (a, b, c)), "all merge")
        wait(peers, lambda: sorted(_owned(a, b, c)) == list(range(a.status["slots_total"])), "every slot has one owner")

        ahead = random.choice([600.0, -30.0])
        print(f"the clock steps by {ahead} s")
        peers.set_clock(c, ahead)
        wait(peers, lambda: len(c.said("clock.off")) > 0, "c says that its clock is off", 30)
        wait(peers, lambda: (c.status["last_error"] or {}).get("code") == "SHOAL-109", "its status says so too", 10)
        commits, lone = (a.commits, b.commits), c.held
        wait(peers, lambda: _went_on(a, b, commits, 4), "the others go on")
        wait(peers, lambda: sorted(_owned(a, b)) == list(range(a.status["slots_total"])), "the others have every slot")
        assert abs(c.status["clock_offset_seconds"] - ahead) < 3
        # Its round that was under way may still become common, and no other; a fragment's next is `len(lone)` further.
        assert c.held[0][0] <= lone[0][0] + len(lone)

        peers.set_clock(c, 0)
        commits = a.commits, c.commits
        wait(peers, lambda: _went_on(a, c, commits, 2), "all merge together again")
        wait(peers, lambda: len({tuple(peer.held) for peer in (a, b, c)}) == 1, "all hold the same")
        wait(peers, lambda: bool(c.leases), "c has slots again")
        assert not c.said("identity.in_use"), "what it said with another clock is not another's"
        assert not any(peer.status["slots"]["lost"] for peer in (a, b, c))
        assert not any(peers.leave().values())


def _owned(*peers: Peer) -> list[int]:
    return [slot for peer in peers for slot in peer.leases]


def _went_on(one: Peer, other: Peer, before: tuple[int, int], rounds: int) -> bool:
    return one.commits >= before[0] + rounds and other.commits >= before[1] + rounds


def _nobody_in(namespace: str) -> bool:
    return not subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, check=True).stdout
