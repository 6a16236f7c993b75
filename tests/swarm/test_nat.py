"""Peers behind routers that nobody can dial through, and a public one that lends them ports: they train together.

Peers are real and stand in network namespaces; the routers masquerade by nftables. Two of them keep ports, as most do:
one refuses who knocks and one says nothing. Through both, holes are punched. The third one takes another port for each
connection, and its peer stays with the relay.
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from shoal.benchmarks.chaos.network import Network, NetworkMissing
from shoal.benchmarks.chaos.peers import Peer, Peers
from shoal.benchmarks.chaos.swarm import wait

FOUND = (
    "found", "--preset", "tiny", "--steps", "100000", "--min-composers", "2", "--lease-seconds", "6",
    "--set", "train.batch_size=2", "--set", "outer.every_steps=8", "--relay", "31400-31410",
)  # fmt: skip

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with Network() as network:
            network.add_behind_nat("a")
            network.add_behind_nat("b", silent=True)
            network.add_behind_nat("c", symmetric=True)
            yield network
    except NetworkMissing as error:
        pytest.skip(str(error))


def test_peers_behind_different_routers_train_together(network: Network, tmp_path: Path) -> None:
    with Peers(network, tmp_path) as peers:
        public = peers.add("p", FOUND)
        wait(peers, lambda: bool(public.status.get("invite")), "founding")
        invite = public.status["invite"]
        assert f"&relay={network.address('p')}:31400" in invite
        a, b = (peers.add(name, ["join", invite, "--data-shard", f"{i}/2"]) for i, name in enumerate("ab"))
        wait(peers, lambda: a.commits > 2 and b.commits > 2, "the two merge: nobody else is a composer")
        wait(peers, lambda: sorted([*a.leases, *b.leases]) == list(range(a.status["slots_total"])), "each owns experts")
        for peer in (a, b):
            [probed] = peer.said("way_in.probed")
            assert probed["address"] == network.address(f"{peer.name}-router")
            assert not probed["reachable"]
            assert len(peer.said("way_in.relayed")) == 1
            assert f"@{network.address('p')}:" in peer.status["invite"], "whom it invites comes by the relay too"
        assert _dials(network, "p", a.status["invite"])
        asked = peers.call("a", ["doctor", invite, "--json"], 120)
        assert asked.returncode == 0, asked.stdout + asked.stderr
        [way_in] = [each["said"] for each in json.loads(asked.stdout) if each["check"] == "way in"]
        assert way_in.startswith(f"behind a router at {network.address('a-router')} that lets nobody in")
        assert not _dials(network, "p", invite.replace(network.address("p"), network.address("a")))
        wait(peers, lambda: any(peer.said("way_out.direct") for peer in (a, b)), "averages pass the relay no more")
        assert _met(a, "direct") + _met(b, "direct") >= 2, "the transports too"
        by_the_relay = _a_token(peers, public, (a, b), "two that meet")
        late = peers.add("c", ["join", a.status["invite"], "--data-shard", "0/2", "--max-slots", "4"])
        wait(peers, lambda: late.commits > 0, "a third one joins by the invite of a peer behind a router")
        assert _met(late, "direct") == 0
        assert _met(late, "relayed") > 0
        assert _a_token(peers, public, (a, b, late), "one cannot be met") > 10 * by_the_relay
        assert not any(peers.leave().values())


def _met(peer: Peer, outcome: str) -> float:
    return peer.status["meetings"].get(outcome, 0)


def _a_token(peers: Peers, relay: Peer, trainers: Sequence[Peer], what: str) -> float:
    """Bytes that the relay carries for each token that is trained, over some rounds."""

    def now() -> tuple[int, int]:
        relayed = sum(each["bytes"] for each in relay.status["bytes"] if each["kind"] == "relayed")
        return relayed, sum(peer.status["tokens"] for peer in trainers)

    begin, commits = now(), trainers[0].commits
    wait(peers, lambda: trainers[0].commits >= commits + 4, "four rounds")
    relayed, tokens = (after - before for before, after in zip(begin, now(), strict=True))
    print(f"{what}: {relayed:,} bytes by the relay, {tokens:,} tokens, {relayed / tokens:.1f} bytes a token")
    return relayed / tokens


def _dials(network: Network, host: str, invite: str) -> bool:
    where = invite.split("@")[1].split("/")[0].split(":")
    dial = ["bash", "-c", f"timeout 3 bash -c '</dev/tcp/{where[0]}/{where[1]}'"]
    return subprocess.run(network.command(host, dial), capture_output=True, check=False).returncode == 0
