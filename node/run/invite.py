"""Invites: one string that leads to a run.

    shoal://<peer id>@<host>:<port>[,<peer id>@<host>:<port>...]/<run id>?v=1

`v` is the protocol version; `&relay=HOST:PORT` says who lends ports to peers that nobody can dial. IPv6 hosts stand in
brackets. An address may also be a whole multiaddr, /dns4/example.org/tcp/4001/p2p/<peer id>. The addresses are those of
directory (DHT) listeners: the peer id in each makes sure that no other machine can pose as it, and the run id commits
to the manifest, so an invite is all that a newcomer has to trust.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs

from ...protocol.addresses import Address, Reach, farthest_first
from ..errors import InviteError
from .manifest import PROTOCOL_VERSION

_SCHEME = "shoal://"
_MAX_CHARS = 4096
_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}-[0-9a-f]{12}")
_FORM = "shoal://PEER_ID@HOST:PORT/RUN_ID?v=1"
_COPY_AGAIN = f"copy the whole invite, in quotes; it looks like {_FORM}"


@dataclass(frozen=True, kw_only=True)
class Invite:
    """Where a run's directory can be joined.

    Raises InviteError if there is no address, one lacks its peer id, or the run id is not one.
    """

    addresses: tuple[Address, ...]
    run_id: str
    relay: Address | None = None  # without a peer id

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise InviteError(f"{self.run_id[:64]!r} is not a run id (name-0123456789ab)", fix=_COPY_AGAIN)
        if not self.addresses:
            raise InviteError("the invite has no address", fix=_COPY_AGAIN)
        for address in self.addresses:
            if not address.peer_id:
                raise InviteError(f"the address {address} lacks its peer id", fix=_COPY_AGAIN)

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite. Blanks and quotes around it are forgiven, and that a terminal or a mail has folded it.

        Raises InviteError saying what is wrong with it.
        """
        text = re.sub(r"\s*[\r\n]\s*", "", text.strip().strip("'\"<>").strip())
        if len(text) > _MAX_CHARS:
            raise InviteError(f"an invite has at most {_MAX_CHARS} characters, this has {len(text)}", fix=_COPY_AGAIN)
        if not text.startswith(_SCHEME):
            raise InviteError(f"{text[:32]!r} does not start with {_SCHEME}", fix=_COPY_AGAIN)
        body, _, query = text.removeprefix(_SCHEME).partition("?")
        _check_version(query)
        body = body.rstrip("/")
        where, slash, run_id = body.rpartition("/")
        if not slash or not where:
            raise InviteError("the invite ends before the run id", fix=_COPY_AGAIN)
        addresses = tuple(_parse_address(part) for part in where.split(",") if part)
        return cls(addresses=addresses, run_id=run_id, relay=_parse_relay(query))

    def multiaddrs(self) -> list[str]:
        """For `start_dht(initial_peers=...)`."""
        return [str(address) for address in self.addresses]

    @property
    def reach(self) -> Reach:
        """From where the farthest reaching of its addresses can be dialled."""
        return farthest_first(list(self.addresses))[0].reach

    @property
    def reachable_from(self) -> str:
        """The same for people: `this machine only`, `the local network` or `anywhere`."""
        return {
            Reach.THIS_MACHINE: "this machine only",
            Reach.LOCAL_NETWORK: "the local network",
            Reach.ANYWHERE: "anywhere",
        }[self.reach]

    def __str__(self) -> str:
        where = ",".join(_format_address(address) for address in self.addresses)
        relay = "" if self.relay is None else f"&relay={_format_endpoint(self.relay)}"
        return f"{_SCHEME}{where}/{self.run_id}?v={PROTOCOL_VERSION}{relay}"


def _check_version(query: str) -> None:
    # Some shells eat an unquoted `?v=1`. Without it, the manifest still tells the version.
    version = parse_qs(query).get("v", [str(PROTOCOL_VERSION)])[-1]
    if not re.fullmatch(r"[0-9]{1,5}", version):
        raise InviteError(f"{version[:16]!r} is not a protocol version", fix=_COPY_AGAIN)
    if int(version) != PROTOCOL_VERSION:
        raise InviteError(
            f"the run speaks protocol {version}, this software speaks protocol {PROTOCOL_VERSION}",
            fix=f"use the image tagged `protocol-{version}`, or pip-install the shoal release for protocol {version}",
        )


def _parse_address(text: str) -> Address:
    try:
        if text.startswith("/"):
            return Address.parse(text)
        peer_id, at, endpoint = text.partition("@")
        if not at:
            raise ValueError(f"{text[:64]!r} lacks the peer id: PEER_ID@HOST:PORT")
        return _parse_endpoint(endpoint, peer_id)
    except ValueError as error:
        raise InviteError(f"the invite has an address that cannot be: {error}", fix=_COPY_AGAIN) from error


def _parse_relay(query: str) -> Address | None:
    named = parse_qs(query, keep_blank_values=True).get("relay")
    try:
        return None if named is None else _parse_endpoint(named[-1])
    except ValueError as error:
        raise InviteError(f"the invite has a relay that cannot be: {error}", fix=_COPY_AGAIN) from error


def _parse_endpoint(text: str, peer_id: str = "") -> Address:
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\]:([0-9]{1,5})|([^:\[\]]+):([0-9]{1,5})", text)
    if match is None:
        raise ValueError(f"{text[:64]!r} is not HOST:PORT (IPv6 in brackets)")
    return Address.of_host(match[1] or match[3], int(match[2] or match[4]), peer_id)


def _format_address(address: Address) -> str:
    return f"{address.peer_id}@{_format_endpoint(address)}"


def _format_endpoint(address: Address) -> str:
    host = f"[{address.host}]" if address.network == "ip6" else address.host
    return f"{host}:{address.port}"
