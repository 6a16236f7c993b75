"""What is open while a peer runs: ports on loan, given and taken, and shortcuts past the relay.

The transport is given local ports in place of those on loan whenever it dials. The directory's daemon finds addresses
by itself, so its connections through the relay are replaced, from one side: by the peer with the smaller id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container

from ...protocol.addresses import Address
from ...protocol.errors import DirectoryError
from ...protocol.relay.lender import Lender
from ...protocol.relay.shortcuts import Shortcuts
from ..config import PeerConfig
from ..errors import ConfigError
from ..logs import get_logger
from ..watching.state import Count
from .links import Links
from .way_in import WayIn

log = get_logger(__name__)

LOOK_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 900.0  # after a connection was not replaced


class Pauses:
    """After attempts that failed, by peer: each is twice as long as the one before."""

    def __init__(self) -> None:
        self._pauses: dict[str, tuple[float, float]] = {}  # seconds, and when it is over

    def __len__(self) -> int:
        return len(self._pauses)

    def over(self, peer: str, now: float) -> bool:
        """Whether there is none now."""
        return self._pauses.get(peer, (0.0, now))[1] <= now

    def begin(self, peer: str, now: float) -> None:
        before, _ = self._pauses.get(peer, (FIRST_PAUSE_SECONDS / 2, now))
        seconds = min(2 * before, LONGEST_PAUSE_SECONDS)
        self._pauses[peer] = seconds, now + seconds

    def forget_all_but(self, peers: Container[str]) -> None:
        """Those of peers that are gone, or they would add up for as long as this peer runs."""
        self._pauses = {peer: pause for peer, pause in self._pauses.items() if peer in peers}


async def open_ways(config: PeerConfig, links: Links, way_in: WayIn, relay: Address | None) -> None:
    """Lend ports, borrow some, or meet peers that borrow, where that is so. ConfigError if a port is taken."""
    ports = config.relay_ports
    if ports is not None:
        lender = Lender(
            config.host,
            ports,
            count=lambda size: links.state.count(Count.BYTES, "relayed", "out", by=size),
            pace=config.pace,
        )
        try:
            await lender.start()
        except OSError as error:
            raise ConfigError(
                f"cannot lend ports: {error.strerror}", fix="give --relay ports that nobody else uses"
            ) from error
    meets = config.reach != "relay"
    borrower = way_in.borrower(links.identity, config.host, meets=meets)
    if borrower is not None:
        links.spawn(borrower.run(), vital=True)
    if relay is not None and ports is None and meets:
        links.shortcuts = Shortcuts(
            relay, met=lambda met: links.state.count(Count.MEETINGS, "direct" if met else "relayed")
        )
        await links.shortcuts.start()
        links.spawn(replace_relayed(links, links.shortcuts), vital=True)


async def replace_relayed(links: Links, shortcuts: Shortcuts) -> None:
    """Until cancelled: see to it that the daemon's connections take the way out that does not pass the relay."""
    pauses = Pauses()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now, peers = links.loop.time(), links.view().peers
        pauses.forget_all_but(peers)
        candidates = {
            peer: record.dht_addrs
            for peer, record in peers.items()
            if links.peer_id < peer and pauses.over(peer, now) and any(map(shortcuts.replaces, record.dht_addrs))
        }
        try:
            routes = await links.directory.routes() if candidates else {}
            for peer, addresses in candidates.items():
                if set(shortcuts.addresses(addresses)) & {f"{route}/p2p/{peer}" for route in routes.get(peer, ())}:
                    continue
                if not await _replace(links, shortcuts, peer, addresses):
                    pauses.begin(peer, now)
        except DirectoryError as error:
            log.info("way_out.unknown", error=error.cause)


async def _replace(links: Links, shortcuts: Shortcuts, peer: str, addresses: list[str]) -> bool:
    for address in addresses:
        here = await shortcuts.prepare(address)
        if here is not None and await links.directory.reroute(peer, here):
            log.info("way_out.direct", peer=peer)
            return True
    return False
