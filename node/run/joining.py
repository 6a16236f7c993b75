"""Catching up with a run: what a peer that comes late, or comes back, fetches before it trains."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable
from functools import partial

from ...protocol.averaging.rounds import latest_commit, majority, tally
from ...protocol.transport.fetches import Turns
from ..backbone.common_state import CommonState, Held
from ..learning.composer import Composer
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import Links
from ..standins.exchange import Exchange

log = get_logger(__name__)

# How long to look for what a quorum backs before going on with what is here; the outer driver keeps looking afterwards.
BACKBONE_SECONDS = 20.0
PARALLEL_FETCHES = 2  # from one peer, which refuses more than a few streams at a time
# Once half of the stand-ins are there, the others have so much longer, and so many times what the first half took: who
# sends as slowly as a fetch allows would keep newcomers from ever beginning.
STANDIN_SECONDS, STANDIN_PATIENCE = 30.0, 3.0


async def catch_up(
    links: Links, trainer: Trainer[Composer], common: CommonState, exchange: Exchange, progress: Callable[[str], None]
) -> None:
    """Fetch the newest common backbone and every owner's published stand-ins.

    A fragment or stand-in that cannot be had now is not an error: the outer driver and the exchange repair it later.
    """
    progress("reading the directory")
    await links.read_directory()
    await _backbone(links, trainer, common, progress)
    await _standins(links, exchange, progress)


async def _backbone(
    links: Links, trainer: Trainer[Composer], common: CommonState, progress: Callable[[str], None]
) -> None:
    parts = len(common.held)
    for index in range(parts):
        progress(f"backbone fragment {index + 1} of {parts}")
        deadline = links.loop.time() + BACKBONE_SECONDS
        while True:
            changed = links.news.next_change()
            # Of the others only: this peer does not take part yet. One that trains alone is believed, too: without its
            # state the two would count different rounds for ever.
            wanted, backers = newest(links, index, parts, majority(len(links.active_composers())))
            if wanted is None and not links.votes(index):
                break  # nobody has merged anything yet
            if wanted is not None and wanted.round <= common.held[index].round:
                break
            if wanted is not None and await common.fetch_fragment(index, wanted, backers):
                # Whatever was trained here before the peer went away is long stale: take the swarm's state as it is.
                await asyncio.wrap_future(trainer.ask(partial(_drop_drift, index=index)))
                break
            if links.loop.time() > deadline:
                log.warning("joining.no_backbone", fragment=index, wanted=str(wanted and wanted.round))
                break
            await links.news.wait(changed, 1.0)


def _drop_drift(composer: Composer, index: int) -> None:
    composer.reset_fragment(index, composer.common[index], composer.momentum[index])


def newest(links: Links, index: int, parts: int, need: int | None = None) -> tuple[Held | None, list[str]]:
    """The newest state that `need` composers (default: a quorum) back, and who has it; (None, []) if there is none."""
    votes = links.votes(index)
    need = links.quorum() if need is None else need
    number = latest_commit([votes], parts, need)
    if number is None:
        return None, []
    verdict = tally(votes, number, parts, need)
    assert verdict.committed is not None
    return Held(number, verdict.committed), [p for p in verdict.supporters if p != links.peer_id]


async def _standins(links: Links, exchange: Exchange, progress: Callable[[str], None]) -> None:
    exchange.on_leases()
    owners = {
        slot: claim.owner
        for slot, claim in links.view().leases.items()
        if claim.owner != links.peer_id and slot in exchange.followed  # anybody can claim slots that there are not
    }
    turns, began, done, late = Turns(PARALLEL_FETCHES), links.loop.time(), 0, math.inf

    async def fetch(slot: int, owner: str) -> None:
        nonlocal done, late
        async with turns.take(owner):
            await exchange.fetch_standin(slot, owner)
            done += 1
            progress(f"stand-ins of slot {slot} ({done} of {len(owners)})")
            if done == math.ceil(len(owners) / 2):
                late = links.loop.time() + STANDIN_SECONDS + STANDIN_PATIENCE * (links.loop.time() - began)

    waiting = {asyncio.create_task(fetch(slot, owner)) for slot, owner in sorted(owners.items())}
    try:
        while waiting and (left := late - links.loop.time()) > 0:
            ended, waiting = await asyncio.wait(
                waiting, timeout=None if left == math.inf else left, return_when=asyncio.FIRST_COMPLETED
            )
            for task in ended:
                task.result()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    if waiting:
        log.warning("joining.no_standins", slots=len(waiting), of=len(owners))


async def go_to_the_swarms_step(links: Links, trainer: Trainer[Composer]) -> None:
    """Who begins, comes back or wakes goes on with the schedule where the others are."""
    step = swarm_step(links)

    def align(composer: Composer) -> None:
        if composer.step < step:
            log.info("joining.late", step=step)
            composer.go_to(step)
            links.state.resume(step=step)

    await asyncio.wrap_future(trainer.ask(align))


def swarm_step(links: Links) -> int:
    """Where the run is: the median step of the other composers that train, or else that wait to; 0 without any."""
    peers = links.view().peers
    for waiting in (False, True):
        others = [peer for peer in links.active_composers(waiting=waiting) if peer != links.peer_id]
        if others:
            return int(statistics.median_low(peers[peer].step for peer in others))
    return 0
