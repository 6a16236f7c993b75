"""Getting parts of a seed from whoever has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from functools import partial

from ...protocol import resources
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused
from ...protocol.transport.downloads import Download
from ...protocol.transport.fetches import Turns
from ..logs import get_logger
from ..peer.links import Links
from .store import SeedMissing, SeedStore

log = get_logger(__name__)

FETCH_SECONDS = 60.0  # and as long as the bytes take
PAUSE_SECONDS = 1.0
# What one of several holders has for sending a part, before another goes on with it; twice as long each time that none
# of them was done.
HOLDER_SECONDS = 30.0
INDEX_BYTES = 1 << 20
HOLDERS = ("bootstrap", "composer")


async def fetch_parts(
    links: Links,
    store: SeedStore,
    wanted: Callable[[], Collection[int]],
    turns: Turns,
    *,
    max_bytes: int,
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Have the index and then all `wanted` parts in the store; what is there, and whole, is not fetched.

    Args:
        wanted: numbers of parts; called once the index is there.
        turns: one at a time for each digest. Slots may have equal parts, and their owner wants all of them at once.
        max_bytes: of a part.
        seconds: how long to look for somebody who has one that is missing, since the last byte came.
        progress: told parts here, and how many are wanted.

    Raises:
        SeedMissing: nobody gave one that is what the manifest says.
    """
    slow: set[str] = set()  # asked last from now on
    if store.digests is None:
        await _from_anybody(links, resources.seed_index(), store.put_index, INDEX_BYTES, seconds, slow)
    numbers = sorted(wanted())
    whole: set[str] = set()  # equal parts are read once
    for done, number in enumerate(numbers):
        progress(done, len(numbers))
        name = store.name(number)
        async with turns.take(name):
            if name not in whole and await asyncio.to_thread(store.part, number) is None:
                await _from_anybody(links, resources.seed(number), partial(store.put, number), max_bytes, seconds, slow)
            whole.add(name)


async def _from_anybody(
    links: Links, resource: str, keep: Callable[[bytes], bool], max_bytes: int, seconds: float, slow: set[str]
) -> None:
    deadline, patience = links.loop.time() + seconds, HOLDER_SECONDS
    begun = Download()

    def came(_got: int, _of: int) -> None:
        nonlocal deadline
        deadline = links.loop.time() + seconds
        links.state.beat()

    while True:
        holders = [p for p, r in links.view().peers.items() if p != links.peer_id and r.role in HOLDERS]
        # Spread over those who have it, and ask the same one as last time for the next part.
        for peer in sorted(holders, key=lambda peer: (peer in slow, hash((links.peer_id, peer)), peer)):
            try:
                async with asyncio.timeout(patience if len(holders) > 1 else None):
                    got = await links.fetch(
                        peer, resource, max_bytes=max_bytes, deadline_seconds=FETCH_SECONDS, progress=came, begun=begun
                    )
                begun.restart()
            except TimeoutError:
                log.info("seed.slow", peer=peer, part=resource, nbytes=len(begun.data))
                slow.add(peer)
                continue
            except (FetchFailed, PeerUnreachable, Refused) as error:
                log.debug("seed.not_given", peer=peer, part=resource, error=str(error))
                continue
            if await asyncio.to_thread(keep, got.data):
                return
            log.warning("seed.wrong", peer=peer, part=resource)
        patience *= 2
        if links.loop.time() > deadline:
            raise SeedMissing(
                f"no peer gave {resource} of the checkpoint that the run starts from",
                fix="start the founder's peer, or any composer that was in the run before",
            )
        await asyncio.sleep(PAUSE_SECONDS)
        await links.read_directory()
