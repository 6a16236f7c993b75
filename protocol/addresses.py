"""Where a peer listens, as a multiaddr (/ip4/203.0.113.5/tcp/4001/p2p/12D3KooW...), and who can dial it there."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from .identity import check_peer_id

Network = Literal["ip4", "ip6", "dns", "dns4", "dns6"]
_NETWORKS: dict[str, Network] = {"ip4": "ip4", "ip6": "ip6", "dns": "dns", "dns4": "dns4", "dns6": "dns6"}
_HOSTNAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?\Z")


class Reach(IntEnum):
    """From where an address can be dialled; larger is farther."""

    THIS_MACHINE = 0
    LOCAL_NETWORK = 1
    ANYWHERE = 2


@dataclass(frozen=True, kw_only=True)
class Address:
    """One TCP listener of a peer. Raises ValueError on a host, port or peer id that cannot be."""

    network: Network
    host: str  # an IP address of that network, or a name
    port: int  # 1..65535
    peer_id: str = ""  # empty where it is not known

    def __post_init__(self) -> None:
        if self.network in ("ip4", "ip6"):
            version = ipaddress.ip_address(self.host).version  # ValueError says what is wrong with it
            if self.network != f"ip{version}":
                raise ValueError(f"{self.host} is not an address of {self.network}")
        elif not _HOSTNAME.match(self.host):
            raise ValueError(f"{self.host[:64]!r} is not a host name")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not in 1..65535")
        if self.peer_id:
            check_peer_id(self.peer_id)

    @classmethod
    def of_host(cls, host: str, port: int, peer_id: str = "") -> Address:
        """Choose the network from the way the host is written: IPv4, IPv6 (no brackets), or a name."""
        try:
            network: Network = "ip4" if ipaddress.ip_address(host).version == 4 else "ip6"
        except ValueError:
            network = "dns"
            if re.fullmatch(r"[0-9.]+", host):
                raise ValueError(f"{host!r} is neither an IP address nor a host name") from None
        return cls(network=network, host=host, port=port, peer_id=peer_id)

    @classmethod
    def parse(cls, multiaddr: str) -> Address:
        """Read /<network>/<host>/tcp/<port>[/p2p/<peer id>]. Raises ValueError on every other form."""
        parts = multiaddr.split("/")
        if len(parts) not in (5, 7) or parts[0] or parts[1] not in _NETWORKS or parts[3] != "tcp":
            raise ValueError(f"{multiaddr[:200]!r} is not of the form /ip4/HOST/tcp/PORT/p2p/PEER_ID")
        if len(parts) == 7 and parts[5] != "p2p":
            raise ValueError(f"{multiaddr[:200]!r} does not end in /p2p/PEER_ID")
        if not re.fullmatch(r"[0-9]{1,5}", parts[4]):
            raise ValueError(f"{parts[4][:16]!r} is not a port")
        return cls(
            network=_NETWORKS[parts[1]],
            host=parts[2],
            port=int(parts[4]),
            peer_id=parts[6] if len(parts) == 7 else "",
        )

    @property
    def reach(self) -> Reach:
        """A name counts as reachable from anywhere, except localhost."""
        if self.network not in ("ip4", "ip6"):
            name = self.host.rstrip(".").lower()
            return Reach.THIS_MACHINE if name == "localhost" or name.endswith(".localhost") else Reach.ANYWHERE
        address = ipaddress.ip_address(self.host)
        if address.is_loopback or address.is_unspecified:
            return Reach.THIS_MACHINE
        return Reach.ANYWHERE if address.is_global else Reach.LOCAL_NETWORK

    def __str__(self) -> str:
        return f"/{self.network}/{self.host}/tcp/{self.port}" + (f"/p2p/{self.peer_id}" if self.peer_id else "")


def farthest_first(addresses: list[Address]) -> list[Address]:
    """Without duplicates; the most widely reachable first; loopback only where there is nothing else."""
    ordered = sorted(dict.fromkeys(addresses), key=lambda address: -address.reach)
    return [address for address in ordered if address.reach > Reach.THIS_MACHINE] or ordered
