"""Where others reach this peer: at its own address, at the one its router has, or by a relay's ports.

Decided once, before anything listens, because the directory's daemon is told its addresses when it starts.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from ...protocol.addresses import Address
from ...protocol.errors import PeerUnreachable
from ...protocol.identity import Identity
from ...protocol.relay.borrower import Borrower, probe, reserve
from ..config import PeerConfig
from ..logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class WayIn:
    """Ports to listen at, and what to tell others. A port of 0 is any free one."""

    hosts: tuple[str, ...]  # to tell, best first
    dht_port: int
    transport_port: int
    announce_dht: tuple[str, ...] = ()  # multiaddrs; empty: what the daemon finds on the interfaces
    announced_transport_port: int | None = None  # None: the one listened at
    relay: Address | None = None  # that lends the ports
    lent: tuple[int, ...] = ()

    def transport_addresses(self, port: int, peer_id: str) -> list[str]:
        """Where to dial the transport, which listens at `port`."""
        return [str(Address.of_host(host, self.announced_transport_port or port, peer_id)) for host in self.hosts]

    def borrower(self, identity: Identity, host: str, *, meets: bool = True) -> Borrower | None:
        """What carries connections to the listeners at `host`, and `meets` diallers outside; None without a relay."""
        if self.relay is None:
            return None
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        listeners = [(local, self.dht_port), (local, self.transport_port)]
        return Borrower(self.relay, identity, self.lent, listeners, meets=meets)

    def lends(self, config: PeerConfig) -> Address | None:
        """Where peers that nobody can dial borrow ports, if this peer lends any."""
        return None if config.relay_ports is None else Address.of_host(self.hosts[0], config.relay_ports[0])


def find_way_in(config: PeerConfig, identity: Identity, relay: Address | None) -> WayIn:
    """Ask the invite's relay, if it names one, whether this peer can be dialled. Blocks for some seconds.

    Raises PeerUnreachable if the peer was told to be reached by a relay, and there is none.
    """
    hosts = config.dialable_hosts()
    announce = [str(Address.of_host(host, config.dht_port)) for host in config.announce] if config.dht_port else []
    direct = WayIn(hosts, config.dht_port, config.transport_port, tuple(announce))
    if config.reach == "relay" and relay is None:
        raise PeerUnreachable("the invite names no relay", fix="ask for the invite of a peer that runs with --relay")
    if relay is None or config.reach == "direct" or config.announce:
        return direct
    dht_port, transport_port = (port or free_port(config.host) for port in (config.dht_port, config.transport_port))
    try:
        if config.reach == "auto":
            seen = asyncio.run(probe(relay, config.host, (dht_port, transport_port)))
            log.info("way_in.probed", address=seen.address, reachable=seen.reachable)
            if seen.reachable and seen.address in {*hosts, *interface_addresses()}:
                return WayIn(hosts, dht_port, transport_port)
            if seen.reachable:  # by ports that the router forwards
                return WayIn((seen.address,), dht_port, transport_port, _at([seen.address], dht_port))
        lent = asyncio.run(reserve(relay, identity))
    except PeerUnreachable as error:
        if config.reach == "relay":
            raise
        log.warning("way_in.no_relay", error=str(error))
        return direct
    log.info("way_in.relayed", relay=relay.host, ports=lent)
    return WayIn(
        (relay.host,), dht_port, transport_port, _at([relay.host], lent[0]), lent[1], relay=relay, lent=tuple(lent)
    )


def _at(hosts: Sequence[str], port: int) -> tuple[str, ...]:
    return tuple(str(Address.of_host(host, port)) for host in hosts)


def interface_addresses() -> set[str]:
    """Every address that this machine has."""
    return {address.address for found in psutil.net_if_addrs().values() for address in found}


def free_port(host: str) -> int:
    """A TCP port that nobody listens at now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as chooser:
        chooser.bind((host, 0))
        return int(chooser.getsockname()[1])
