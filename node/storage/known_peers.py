"""Peers met before, on disk: the way back into a run when the peer of its invite is gone.

`known-peers-<run id>.json` in the data directory, by peer id the multiaddrs of its directory listener, the one that was
seen last at the end. Whoever answers there must prove the peer id, so the file needs no more protection than an invite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...protocol.addresses import Address
from ..logs import get_logger

log = get_logger(__name__)

MAX_PEERS = 32
MAX_ADDRESSES = 4  # of one peer


class KnownPeers:
    """The peers of one run that this peer has met."""

    def __init__(self, data_dir: Path, run_id: str) -> None:
        self._path = data_dir / f"known-peers-{run_id}.json"
        self._peers = _read(self._path)

    @property
    def peers(self) -> Mapping[str, Sequence[str]]:
        """By peer id its addresses, each ending in /p2p/<peer id>; the one seen last comes first."""
        return dict(reversed(self._peers.items()))

    def addresses(self) -> list[str]:
        """The first address of each, the peer seen last first."""
        return [addresses[0] for addresses in self.peers.values()]

    def meet(self, seen: Mapping[str, Sequence[str]]) -> None:
        """Remember these peers and where they are. Writes the file only if that is news; does not raise."""
        known = {peer: kept for peer, addresses in seen.items() if (kept := _dialable(peer, addresses))}
        others = {peer: addresses for peer, addresses in self._peers.items() if peer not in known}
        remembered = dict(list({**others, **known}.items())[-MAX_PEERS:])
        if remembered == self._peers:  # in whatever order; of a large swarm there is no room for all
            return
        self._peers = remembered
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self._peers))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("known_peers.not_written", path=str(self._path), error=str(error))


def _read(path: Path) -> dict[str, list[str]]:
    try:
        told = json.loads(path.read_text())
        peers = {str(peer): _dialable(str(peer), addresses) for peer, addresses in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("known_peers.damaged", path=str(path), error=str(error))
        return {}
    return {peer: addresses for peer, addresses in peers.items() if addresses}


def _dialable(peer: str, addresses: Sequence[str]) -> list[str]:
    """Those that are TCP addresses of that peer; anybody may announce anything."""
    good = []
    for text in addresses:
        try:
            if Address.parse(text).peer_id == peer:
                good.append(text)
        except ValueError:
            continue
    return good[:MAX_ADDRESSES]
