"""Ownership as virtual peers live it: `ownership.decide` over what each of them sees, and what follows from it.

A cohort looks every tenth of a lease. Of its peers those are asked that could answer something: who owns, keeps or is
listed for a slot, and everybody once a slot has been without an owner for so long that anybody may take it. The others
would decide nothing; `ask_everybody` asks them all the same, and must give the same history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ...protocol.directory.standing import Standing, situated
from ...protocol.directory.view import LeaseClaim, wins
from ...protocol.experts.ownership import (
    COPY_RAISE,
    ClaimFree,
    Copy,
    DropStandby,
    KeepStandby,
    Reclaim,
    RequestHandover,
    Rules,
    Situation,
    TakeOver,
    Yield,
    decide,
    grants_handover,
)
from .board import Cohort
from .world import VirtualPeer, World

PREPARE_SECONDS = 0.3  # to put a slot into the model
RETRY_SECONDS = 1.0


class SlotLife:
    """All slots of all peers."""

    def __init__(self, world: World, *, ask_everybody: bool = False) -> None:
        self._world, self._ask_everybody = world, ask_everybody
        self._rules = Rules(lease=world.lease)
        self._replication = world.manifest.ownership.replication
        self.holders: dict[int, dict[str, int]] = {slot: {} for slot in range(world.num_slots)}  # peer id: epoch
        self._claimed: set[int] = set()  # slots that somebody has owned
        self._counted = 0.0  # until when time without owners is counted
        self._double_since: dict[int, float] = {}
        self._arrived: dict[str, float] = {}  # joiners that have not looked yet
        self._expecting: dict[str, tuple[float, set[int]]] = {}  # joiners that do not have their slots yet
        for cohort in world.board.cohorts:
            offset = world.engine.rng(f"look/{cohort.index}").uniform(0, world.lease / 10)
            world.engine.after(offset, self._cohort_looks, cohort)
        world.engine.after(world.lease / 2, self._audit)

    # -- looking ---------------------------------------------------------------------------------------------------

    def _cohort_looks(self, cohort: Cohort) -> None:
        world = self._world
        world.engine.after(world.lease / 10, self._cohort_looks, cohort)
        if not cohort.members:
            return
        standing = world.board.standing(cohort)
        desired = standing.desired(world.num_slots, self._replication)
        listed = {peer for peers in desired for peer in peers}
        anybody = self._ask_everybody or self._anybody_may_act(standing, desired)
        for peer_id in sorted(cohort.members):
            peer = world.peers[peer_id]
            if peer.phase == "syncing":
                continue
            if anybody or peer_id in listed or self._has_a_part(peer, standing):
                self._peer_looks(peer, standing)

    def _anybody_may_act(self, standing: Standing, desired: Sequence[Sequence[str]]) -> bool:
        """Whether a peer that is not listed and has no copy may have its turn at some slot."""
        for slot, listed in enumerate(desired):
            claim = standing.claims.get(slot)
            if claim is None or self._world.now >= claim.expires_at + (len(listed) + 1) * self._rules.grace:
                return True
        return False

    @staticmethod
    def _has_a_part(peer: VirtualPeer, standing: Standing) -> bool:
        capacity = 0 if peer.leaving else peer.capacity
        return bool(
            peer.slots or peer.copies or peer.watch.wanted_since or standing.capacities.get(peer.id) != capacity
        )

    def _situation(self, peer: VirtualPeer, standing: Standing) -> Situation:
        return situated(
            standing,
            peer.watch,
            now=self._world.now,
            capacity=0 if peer.leaving else peer.capacity,
            num_slots=self._world.num_slots,
            replication=self._replication,
            held=peer.slots,
            copies=peer.copies,
            busy=peer.busy,
        )

    def _peer_looks(self, peer: VirtualPeer, standing: Standing) -> None:
        world = self._world
        situation = self._situation(peer, standing)
        if peer.id in self._arrived:
            since = self._arrived.pop(peer.id)
            mine = {slot for slot, listed in enumerate(situation.desired) if listed and listed[0] == peer.id}
            if mine:
                self._expecting[peer.id] = (since, mine)
        for action in decide(peer.watch, situation, self._rules):
            match action:
                case Yield(slot, to_peer, epoch):
                    self._let_go(peer, slot, to_peer, epoch)
                case Reclaim(slot, to_peer, epoch):
                    self._let_go(peer, slot, to_peer, epoch)
                    world.measures.claimed_back += 1
                    peer.busy.add(slot)
                    world.engine.after(PREPARE_SECONDS, self._acquire, peer, slot, epoch, peer.copies[slot].version)
                case DropStandby(slot):
                    peer.copies.pop(slot, None)
                case ClaimFree(slot, epoch):
                    peer.busy.add(slot)
                    world.engine.after(PREPARE_SECONDS, self._acquire, peer, slot, epoch, 0)
                case TakeOver():
                    self._take_over(peer, action)
                case RequestHandover(slot, from_peer, epoch):
                    self._ask_for(peer, slot, from_peer, epoch)
                case KeepStandby(slot, owner, epoch, _):
                    self._keep_copy(peer, slot, owner, epoch)
        step, every = peer.step(world.now), world.manifest.ownership.snapshot_every
        moved = [slot for slot, version in peer.versions.items() if step - version >= every]
        for slot in moved:
            peer.versions[slot] = step - step % every
        if moved:
            world.announce_slots(peer)
        for slot, epoch in peer.slots.items():
            own = LeaseClaim(owner=peer.id, epoch=epoch, version=0, expires_at=0.0)
            known = peer.watch.claims.get(slot, own)
            world.engine.require(not wins(known, own), f"{peer.name} owns slot {slot} at epoch {epoch} against {known}")

    # -- gaining and losing ----------------------------------------------------------------------------------------

    def _acquire(self, peer: VirtualPeer, slot: int, epoch: int, version: int) -> None:
        world = self._world
        peer.busy.discard(slot)
        if not peer.alive or peer.leaving:
            return
        world.engine.require(
            len(peer.slots) < peer.capacity, f"{peer.name} takes slot {slot} above its capacity of {peer.capacity}"
        )
        self.count()
        peer.slots[slot] = epoch
        peer.versions[slot] = max(version, peer.step(world.now))
        peer.copies.pop(slot, None)
        self.holders[slot][peer.id] = epoch
        self._claimed.add(slot)
        world.measures.moves += 1
        world.announce_slots(peer)
        claim = LeaseClaim(owner=peer.id, epoch=epoch, version=peer.versions[slot], expires_at=world.now + world.lease)
        peer.watch.observe(world.now, {slot: claim}, [])
        world.engine.note("slot.owned", peer=peer.name, slot=slot, epoch=epoch)
        for joiner, (since, missing) in list(self._expecting.items()):
            if joiner == peer.id:
                missing.discard(slot)
                if not missing:
                    world.measures.settling_seconds.append(world.now - since)
                    del self._expecting[joiner]

    def _let_go(self, peer: VirtualPeer, slot: int, to_peer: str, epoch: int) -> None:
        self.count()
        peer.copies[slot] = Copy(peer.slots.pop(slot), peer.versions.pop(slot))
        self.holders[slot].pop(peer.id, None)
        world = self._world
        world.announce_slots(peer)
        taker = world.peers.get(to_peer)
        world.engine.note("slot.released", peer=peer.name, slot=slot, to=taker.name if taker else "-", epoch=epoch)

    def _fetched(self, peer: VirtualPeer, slot: int, sender: VirtualPeer, kind: str) -> float:
        """Account for a slot on its way; how long it takes."""
        self._world.sent(kind, self._world.wire.slot)
        peer.busy.add(slot)
        return self._world.transfer_seconds(sender, peer, self._world.wire.slot)

    def _give_up(self, peer: VirtualPeer, slot: int) -> None:
        peer.busy.add(slot)
        self._world.engine.after(RETRY_SECONDS, peer.busy.discard, slot)

    def _take_over(self, peer: VirtualPeer, action: TakeOver) -> None:
        world, slot, copy = self._world, action.slot, action.copy
        seconds = PREPARE_SECONDS
        if copy is None:
            sources = [world.peers[p] for p in action.sources if p in world.peers and slot in world.peers[p].copies]
            source = next((each for each in sources if world.together(each, peer)), None)
            if source is not None:
                copy, seconds = source.copies[slot], self._fetched(peer, slot, source, "slots")
        if copy is None:
            world.measures.lost_slots += 1
            others = [p for p in world.peers.values() if slot in p.copies and world.together(p, peer)]
            world.measures.avoidable_losses += bool(others)
            world.engine.note(
                "slot.lost", peer=peer.name, slot=slot, epoch=action.epoch, kept_by=[p.name for p in others]
            )
        peer.busy.add(slot)
        version = 0 if copy is None else copy.version
        world.engine.after(seconds, self._acquire, peer, slot, action.epoch, version)

    def _ask_for(self, peer: VirtualPeer, slot: int, from_peer: str, epoch: int) -> None:
        world = self._world
        owner = world.peers.get(from_peer)
        if owner is None or not world.together(owner, peer):
            self._give_up(peer, slot)
            return
        situation = self._situation(owner, world.board.standing(owner.cohort))
        if not grants_handover(owner.watch, situation, slot, peer.id, epoch):
            self._give_up(peer, slot)
            return
        seconds = self._fetched(peer, slot, owner, "slots")
        world.engine.after(seconds, self._handed_over, peer, owner, slot, epoch)

    def _handed_over(self, peer: VirtualPeer, owner: VirtualPeer, slot: int, epoch: int) -> None:
        if self._world.together(owner, peer) and owner.slots.get(slot) == epoch - COPY_RAISE:
            self._acquire(peer, slot, epoch, owner.versions[slot])
        else:
            self._give_up(peer, slot)

    def _keep_copy(self, peer: VirtualPeer, slot: int, owner_id: str, epoch: int) -> None:
        world = self._world
        owner = world.peers.get(owner_id)
        if owner is None or not world.together(owner, peer) or owner.slots.get(slot) != epoch:
            self._give_up(peer, slot)
            return
        copy = Copy(epoch, owner.step(world.now))
        world.engine.after(self._fetched(peer, slot, owner, "slots"), self._kept, peer, owner, slot, copy)

    def _kept(self, peer: VirtualPeer, owner: VirtualPeer, slot: int, copy: Copy) -> None:
        peer.busy.discard(slot)
        if peer.alive and self._world.board.together(peer.cohort, owner.cohort) and slot not in peer.slots:
            peer.copies[slot] = copy

    # -- what happens to peers -------------------------------------------------------------------------------------

    def joined(self, peer: VirtualPeer, *, at_start: bool) -> None:
        """It can own slots from now on. It knows the epochs of the stand-ins that it has fetched."""
        epochs = {slot: claim.epoch for slot, claim in peer.cohort.strongest.items()}
        peer.watch.recall(self._world.now, epochs)
        if not at_start:
            self._arrived[peer.id] = self._world.now

    def gone(self, peer: VirtualPeer) -> None:
        """It has died, or left."""
        self.count()
        self._expecting.pop(peer.id, None)
        self._arrived.pop(peer.id, None)
        step = peer.step(self._world.now)
        for slot in peer.slots:
            self.holders[slot].pop(peer.id, None)
            if not peer.leaving:
                self._world.measures.lost_slot_steps += step - peer.versions[slot]

    # -- watching --------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Add up the time since the last change of owners."""
        seconds, self._counted = self._world.now - self._counted, self._world.now
        orphans = sum(not self.holders[slot] for slot in self._claimed)
        self._world.measures.orphaned_slot_seconds += orphans * seconds
        double = sum(len(holders) > 1 for holders in self.holders.values())
        self._world.measures.doubly_owned_slot_seconds += double * seconds

    def _audit(self) -> None:
        """Two owners of a slot that can hear of each other must not last, nor anybody above its capacity."""
        world = self._world
        world.engine.after(world.lease / 2, self._audit)
        self.count()
        slowest = max(cohort.lag for cohort in world.board.cohorts)
        for slot, holders in self.holders.items():
            by_side: dict[bool, list[str]] = defaultdict(list)
            for peer_id in holders:
                by_side[world.peers[peer_id].cohort.cut_since is None].append(peer_id)
            if all(len(each) < 2 for each in by_side.values()):
                self._double_since.pop(slot, None)
                continue
            since = self._double_since.setdefault(slot, world.now)
            names = [f"{world.peers[p].name} at {e}" for p, e in holders.items()]
            patience = world.lease + 2 * slowest
            world.engine.require(world.now - since <= patience, f"slot {slot} has two owners for long: {names}")
        for peer in world.peers.values():
            world.engine.require(
                peer.leaving or len(peer.slots) <= peer.capacity, f"{peer.name} owns {len(peer.slots)} slots"
            )
