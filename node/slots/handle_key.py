"""The run's handle key: made by the founder, kept by every composer, given to peers that hold a backbone anyway.

It names experts towards workers without saying where they sit. The manifest commits to it by digest, so that a joiner
knows a right one. Who can be a composer can have it: admission decides how much that hides (docs/privacy.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ...protocol import resources
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused, ShoalError
from ...protocol.experts.handles import KEY_BYTES, key_digest, new_key
from ..errors import ConfigError
from ..logs import get_logger
from ..peer.links import Links
from ..storage.whole_file import write_whole

log = get_logger(__name__)

FETCH_SECONDS = 10.0
PAUSE_SECONDS = 0.5
PRIVATE = 0o600  # a file's mode
HOLDERS = frozenset({"composer", "bootstrap", "observer"})


class HandleKeyMissing(ShoalError):
    """No peer of the run gave its handle key."""

    code = "SHOAL-251"


def found_key(path: Path) -> bytes:
    """The key for runs founded here: the one kept at `path`, else a new one. ConfigError if that file is damaged."""
    if not path.exists():
        write_whole(path, new_key(), mode=PRIVATE)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{path} is damaged: {len(key)} bytes, and a handle key has {KEY_BYTES}",
            fix="put a copy of it there; if no run that you founded goes on, delete it",
        )
    return key


def kept_key(paths: Sequence[Path], digest: str) -> bytes | None:
    """The key with this digest (hex) among the files, if it is there."""
    for path in paths:
        if path.exists() and key_digest(path.read_bytes()).hex() == digest:
            return path.read_bytes()
    return None


async def fetch_key(links: Links, paths: Sequence[Path], *, seconds: float) -> bytes:
    """This run's key, from one of the files or from a peer that has it; then it is kept in the last of the files.

    Raises:
        HandleKeyMissing: nobody gave one that fits the manifest within `seconds`.
    """
    digest = links.manifest.privacy.handle_key_digest
    if not digest:
        return bytes(KEY_BYTES)  # a run that hides nothing
    kept = kept_key(paths, digest)
    if kept is not None:
        return kept
    deadline = links.loop.time() + seconds
    while links.loop.time() < deadline:
        await links.read_directory()
        for peer, record in links.view().peers.items():
            if peer == links.peer_id or record.role not in HOLDERS:
                continue
            try:
                got = await links.fetch(
                    peer, resources.handle_key(), max_bytes=KEY_BYTES, deadline_seconds=FETCH_SECONDS
                )
            except (FetchFailed, PeerUnreachable, Refused) as error:
                log.debug("handle_key.not_given", peer=peer, error=str(error))
                continue
            if key_digest(got.data).hex() == digest:
                write_whole(paths[-1], got.data, mode=PRIVATE)
                return got.data
            log.warning("handle_key.wrong", peer=peer)
        await asyncio.sleep(PAUSE_SECONDS)
    raise HandleKeyMissing(
        "no composer or founder of the run gave its handle key",
        fix="start the founder's peer or any composer that was in the run before",
    )
