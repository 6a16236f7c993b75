"""Two peers behind routers that nobody can dial through, and a public one that lends them ports: they train together.

Peers are real and stand in network namespaces; the routers masquerade by nftables.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal.benchmarks.chaos.network import Network, NetworkMissing
from shoal.benchmarks.chaos.peers import Peers
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
            for name in "ab":
                network.add_behind_nat(name)
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
        relayed = sum(each["bytes"] for each in public.status["bytes"] if each["kind"] == "relayed")
        trained = a.status["tokens"] + b.status["tokens"]
        print(f"{relayed:,} bytes by the relay, {trained:,} tokens, {relayed / trained:.0f} bytes a token")
        assert relayed > 1_000_000
        late = peers.add("c", ["join", a.status["invite"], "--data-shard", "0/2", "--max-slots", "4"])
        wait(peers, lambda: late.commits > 0, "a third one joins by the invite of a peer behind a router")
        assert not any(peers.leave().values())


def _dials(network: Network, host: str, invite: str) -> bool:
    where = invite.split("@")[1].split("/")[0].split(":")
    dial = ["bash", "-c", f"timeout 3 bash -c '</dev/tcp/{where[0]}/{where[1]}'"]
    return subprocess.run(network.command(host, dial), capture_output=True, check=False).returncode == 0
