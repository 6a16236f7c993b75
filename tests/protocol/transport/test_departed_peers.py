"""What the host process keeps of peers that were connected: it lives for weeks, and thousands come and go.

In a process of its own: py-libp2p shares none with hivemind.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VISITORS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    key = tmp_path_factory.mktemp("host") / "key"
    command = [sys.executable, "-P", __file__, str(key)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_nothing_is_kept_of_who_has_left(found: dict[str, Any]) -> None:
    assert found["known"] == [2] * VISITORS  # the host itself, and the visitor of that time
    assert found["known_at_the_end"] == 1


def test_nobody_is_dialled_unasked(found: dict[str, Any]) -> None:
    assert found["connected_unasked"] == 0


async def _main(key: Path) -> None:
    import trio
    from libp2p import new_host
    from libp2p.network.auto_connector import AutoConnector
    from multiaddr import Multiaddr
    from shoal.protocol.identity import Identity
    from shoal.protocol.transport import ipc
    from shoal.protocol.transport.host import _build
    from shoal.protocol.transport.limits import Limits
    from shoal.protocol.transport.links import Links

    start = ipc.Start(str(key), "run", "127.0.0.1", 0, Limits(), 0, [], [])
    host = _build(Identity.load_or_create(key), start)
    swarm, store = host.get_network(), host.get_peerstore()
    anywhere = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    result: dict[str, Any] = {"known": []}

    async def send(_frame: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def until(condition: Any) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110 - what it waits for is py-libp2p's: there is no event
                await trio.sleep(0.01)

    async with host.run(listen_addrs=anywhere), trio.open_nursery() as nursery:
        Links(host, Limits(), nursery, send)
        [address] = host.get_transport_addrs()
        for _ in range(VISITORS):
            visitor = new_host(muxer_preference="YAMUX")
            async with visitor.run(listen_addrs=anywhere):
                await visitor.get_network().dial_addr(address, host.get_id())
                await until(lambda: store.has_peer(visitor.get_id()))  # noqa: B023 - called within this turn
                result["known"].append(len(store.peer_ids()))
                await visitor.get_network().close_peer(host.get_id())
                await until(lambda: not store.has_peer(visitor.get_id()))  # noqa: B023
        result["known_at_the_end"] = len(store.peer_ids())

        stranger = new_host(muxer_preference="YAMUX")
        async with stranger.run(listen_addrs=anywhere):
            store.add_addrs(stranger.get_id(), stranger.get_transport_addrs(), 60)
            assert isinstance(swarm.auto_connector, AutoConnector)
            await swarm.auto_connector.maybe_connect()
            result["connected_unasked"] = len(swarm.get_connections())
        print(json.dumps(result), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    import trio

    trio.run(_main, Path(sys.argv[1]))
