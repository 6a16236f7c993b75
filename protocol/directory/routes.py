"""By which addresses the directory's daemon is connected to others, and changing that. For `dht.run_coroutine`."""

from __future__ import annotations

import asyncio
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

_DIAL_SECONDS = 5.0


async def read_routes(_dht: Any, node: DHTNode) -> dict[str, list[str]]:
    """By peer id the far ends of its connections, as multiaddrs without /p2p/. Empty if the daemon does not say."""
    try:
        async with asyncio.timeout(_DIAL_SECONDS):
            connected = await node.p2p.list_peers()
    except (P2PDaemonError, OSError, TimeoutError):
        return {}
    return {info.peer_id.to_base58(): [str(each) for each in info.addrs] for info in connected}


async def reroute(_dht: Any, node: DHTNode, *, peer: str, address: str) -> bool:
    """Hang up on a peer and dial `address` (it ends in /p2p/<peer id>): whether that is the connection now.

    What was under way on the old connection breaks off.
    """
    there = address.removesuffix(f"/p2p/{peer}")
    try:
        async with asyncio.timeout(_DIAL_SECONDS):
            await node.p2p._client.disconnect(PeerID.from_base58(peer))
            await node.p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(there)])
    except (P2PDaemonError, OSError, TimeoutError):
        return False
    return there in (await read_routes(_dht, node)).get(peer, ())
