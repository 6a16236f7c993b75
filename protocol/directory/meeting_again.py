"""Finding back into the others' DHT after the network had been split.

hivemind drops a node that does not answer from its routing table, bans it for longer each time, and never asks it
again on its own. Two sides of a split that lasted longer than their requests' patience therefore stay two DHTs when the
network has healed, and nobody on one side finds groups, leases or votes of the other. So every peer keeps looking for
peers whose records it has, expired ones too, and that its routing table lacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

_DIAL_SECONDS = 5.0


async def meet_again(_dht: Any, node: DHTNode, *, peers: Mapping[str, Sequence[str]]) -> list[str]:
    """Dial and ping those of `peers` that the routing table lacks or that are banned. For `dht.run_coroutine`.

    Args:
        peers: multiaddrs by peer id, each ending in /p2p/<peer id>.

    Returns:
        Who answered: both know each other again.
    """
    missing = [
        peer
        for name in peers
        if (peer := PeerID.from_base58(name)) in node.blacklist or node.protocol.routing_table.get(peer_id=peer) is None
    ]
    answered = await asyncio.gather(*(_met(node, peer, peers[peer.to_base58()]) for peer in missing))
    return [peer.to_base58() for peer, met in zip(missing, answered, strict=True) if met]


async def _met(node: DHTNode, peer: PeerID, addresses: Sequence[str]) -> bool:
    suffix = f"/p2p/{peer.to_base58()}"
    try:
        async with asyncio.timeout(_DIAL_SECONDS):
            # The daemon forgets addresses of peers that have been gone for long.
            await node.p2p._client.connect(peer, [Multiaddr(address.removesuffix(suffix)) for address in addresses])
            if await node.protocol.call_ping(peer) is None:
                return False
    except Exception:  # noqa: BLE001 - the daemon's, a socket's or the parser's: it is not there, which is no news
        return False
    node.blacklist.register_success(peer)
    return True
