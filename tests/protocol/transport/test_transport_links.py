"""What the host process keeps of peers that it dials. In a process of its own: py-libp2p shares none with hivemind."""

import json
import subprocess
import sys
from typing import Any

import pytest

PEERS = 20


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_nothing_is_kept_of_peers_once_dialled(found: dict[str, Any]) -> None:
    assert found["unreachable"] == 2 * PEERS
    assert found["locks"] == 0


def test_a_peer_that_is_forgotten_and_kept_again_is_dialled_by_one_task(found: dict[str, Any]) -> None:
    assert found["dialling"] == 1
    assert found["after"] == 0


async def _main() -> None:
    import trio
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr
    from shoal.protocol.transport.limits import Limits
    from shoal.protocol.transport.links import Links, Unreachable

    host, result = new_host(muxer_preference="YAMUX"), {"unreachable": 0}
    nobody = Multiaddr("/ip4/127.0.0.1/tcp/1")
    peers = [str(ID.from_pubkey(create_new_key_pair().public_key)) for _ in range(PEERS)]

    async def send(_frame: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def dial(links: Links, peer: str) -> None:
        try:
            await links.dial(peer, [nobody])
        except Unreachable:
            result["unreachable"] += 1

    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]), trio.open_nursery() as nursery:
        links = Links(host, Limits(redial_max_seconds=0.2), nursery, send)
        async with trio.open_nursery() as dialling:
            for peer in 2 * peers:
                dialling.start_soon(dial, links, peer)
        result["locks"] = len(links._dialling)

        for _ in range(5):
            links.keep(peers[0], [nobody])
            await trio.lowlevel.checkpoint()
            await links.forget(peers[0])
        links.keep(peers[0], [nobody])
        await trio.sleep(1.0)
        result["dialling"] = sum("_stay_connected" in task.name for task in nursery.child_tasks)
        await links.forget(peers[0])
        await trio.sleep(1.0)
        result["after"] = sum("_stay_connected" in task.name for task in nursery.child_tasks)
        print(json.dumps(result), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    import trio

    trio.run(_main)
