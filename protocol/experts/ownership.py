"""What one peer does about who should own which slot (`rendezvous.py`). Pure: clock and view are arguments.

**Epochs.** Each change of owner raises a slot's epoch by two, a restart without a copy only by one: a peer that was cut
off from all copies must lose to who went on from one, whatever their ids. Of two claims the higher epoch wins, then the
smaller peer id (view.py). A peer that sees a claim win over its own is deposed and stops at once.

**Cut off.** Where an owner and its standbys are on one side of a split, the other side restarts its slots. The owner,
whose state is the better one, sees that by the epoch and claims its slot back above it; who restarted it yields. So
does an owner that was down meanwhile, as long as its checkpoint is ahead of what was restarted.

**Lost sight of.** Where all peers have stopped, those who come back first may know less than the last epochs. What
others have on disk of later ones counts only as long as it is further than what those who are there go on with.

**Distrust.** Claims of a peer that was found to lie (auditing.py) count for nothing, however high, and its slots are
abandoned. Their epoch stays known, so that the next claim is above it for those who still trust: not the one that the
liar names, which may leave no room above it, but one above its predecessor's, which it can have come by honestly.

**Turns.** Nobody coordinates a takeover; time does. When a lease has run out, holders of a copy act in desired order,
one `grace` after another (those whose copy is from an earlier epoch, or who are not listed, after the listed ones);
then everybody else who has room, desired owner first: the swarm has lost the expert, and that is loud. If two act at
once they claim the same epoch, and the weaker one yields as soon as it sees the other's record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..directory.records import MAX_EPOCH
from ..directory.view import LeaseClaim, wins
from .rendezvous import draws_of

COPY_RAISE = 2  # of the epoch, by who goes on from a copy, kept or handed over; a restart raises it by one
UNKNOWN_OWNER = "~"  # of an epoch learned otherwise; loses every tie, being greater than any peer id
DEPOSED_OWNER = "~deposed"  # of a slot whose owner is distrusted; any live claim beats it


@dataclass(frozen=True)
class Copy:
    """A standby's or a checkpoint's state of a slot, on this peer."""

    epoch: int
    version: int
    mine: bool = False  # this peer's checkpoint has it: it owned the slot then


@dataclass(frozen=True)
class Rules:
    """How patient peers are. All in seconds."""

    lease: float = 20.0

    @property
    def settle(self) -> float:
        """How long the directory must have named this peer before it claims a free slot or asks an owner for one."""
        return self.lease / 8

    @property
    def grace(self) -> float:
        """How long one candidate for an orphaned slot has before it is the next one's turn."""
        return self.lease / 2

    @property
    def keep_unlisted(self) -> float:
        """How long a standby that is no longer listed keeps its copy: the new one must have fetched it by then."""
        return 3 * self.lease


@dataclass(frozen=True)
class ClaimFree:
    """Nobody ever owned the slot: start it from the run's seed."""

    slot: int
    epoch: int


@dataclass(frozen=True)
class TakeOver:
    """The owner is gone. Publish the lease first, then train.

    `copy` is what this peer goes on from. None means that it has no copy: ask `sources` for one, and if nobody answers
    restart from the published stand-in or the seed, loudly. It is `outdone` if it is this peer's own, and `sources` may
    have one that they fetched later, before this peer was restarted.
    """

    slot: int
    epoch: int
    copy: Copy | None
    sources: tuple[str, ...]
    outdone: bool = False

    @property
    def lost(self) -> bool:
        return self.copy is None


@dataclass(frozen=True)
class RequestHandover:
    """Ask the live owner to freeze and hand over the slot; then claim it at `epoch`."""

    slot: int
    from_peer: str
    epoch: int


@dataclass(frozen=True)
class Yield:
    """This peer is deposed: stop training and publishing the slot at once. What it has becomes a copy of its epoch."""

    slot: int
    to_peer: str
    epoch: int


@dataclass(frozen=True)
class Reclaim:
    """Others could not reach this peer and restarted its slot without a copy: go on from what it has, at `epoch`.

    Until that is announced the slot is `to_peer`'s, as after a `Yield`.
    """

    slot: int
    to_peer: str
    epoch: int


@dataclass(frozen=True)
class KeepStandby:
    """Fetch the owner's snapshot, which is newer than the copy here."""

    slot: int
    owner: str
    epoch: int
    version: int


@dataclass(frozen=True)
class DropStandby:
    """The copy is no longer needed here."""

    slot: int


Action = ClaimFree | TakeOver | RequestHandover | Yield | Reclaim | KeepStandby | DropStandby


@dataclass
class Watch:
    """What one peer remembers about the slots between two looks at the directory, which forgets what has expired.

    Args:
        me: this peer's id.
    """

    me: str
    claims: dict[int, LeaseClaim] = field(default_factory=dict)  # the strongest ever seen per slot, expired ones too
    wanted_since: dict[int, float] = field(default_factory=dict)  # this peer is the desired owner, without a break
    unlisted_since: dict[int, float] = field(default_factory=dict)  # this peer is neither owner nor standby
    free_since: dict[int, float] = field(default_factory=dict)  # first look at a slot that nobody ever claimed
    fair: dict[int, int] = field(default_factory=dict)  # epochs that the claims' owners can have come by honestly
    distrusted: set[str] = field(default_factory=set)  # peers
    saved: dict[int, LeaseClaim] = field(default_factory=dict)  # what this peer had on disk when it started
    _desired: Sequence[Sequence[str]] = ()  # at the last look

    def observe(self, now: float, claims: Mapping[int, LeaseClaim], desired: Sequence[Sequence[str]]) -> None:
        """Takes in the directory's claims (live and last known, this peer's too) and the desired owners.

        Call before every `decide`.
        """
        for slot, claim in claims.items():
            if claim.owner in self.distrusted:
                continue
            known = self.claims.get(slot)
            renewed = known is not None and (claim.owner, claim.epoch) == (known.owner, known.epoch)
            # If the liar had jumped over somebody who holds the slot still, that was no change of owner.
            hidden = known is not None and claim.expires_at > now and self._gives_way(slot, known, claim)
            if known is None or hidden or wins(claim, known) or (renewed and claim.expires_at > known.expires_at):
                if known is None or known.owner != claim.owner:
                    self.fair[slot] = claim.epoch if known is None else min(claim.epoch, known.epoch + COPY_RAISE)
                self.claims[slot] = claim
                if hidden:
                    self.saved.pop(slot, None)
        self.free_since = {slot: since for slot, since in self.free_since.items() if slot not in self.claims}
        changed, self._desired = desired is not self._desired, desired or self._desired
        for slot, peers in enumerate(desired if changed else ()):  # at most looks it has not
            _since(self.wanted_since, slot, now, bool(peers) and peers[0] == self.me)
            _since(self.unlisted_since, slot, now, self.me not in peers)
            _since(self.free_since, slot, now, slot not in self.claims)

    def _gives_way(self, slot: int, known: LeaseClaim, live: LeaseClaim) -> bool:
        """Whether a live claim counts whatever its epoch: the known one is a liar's, or a state on this disk that the
        swarm has lost sight of and gone beyond."""
        saved = self.saved.get(slot)
        if saved is not None and (known.owner, known.epoch) == (saved.owner, saved.epoch):
            return live.version >= saved.version
        return known.owner == DEPOSED_OWNER

    def distrust(self, now: float, peer: str) -> None:
        """From now on ignore a peer's claims. Slots that it had are abandoned, at an epoch that it can have had."""
        self.distrusted.add(peer)
        for slot, claim in self.claims.items():
            if claim.owner == peer:
                self.claims[slot] = LeaseClaim(owner=DEPOSED_OWNER, epoch=self.fair[slot], version=0, expires_at=now)

    def recall(self, now: float, epochs: Mapping[int, int]) -> None:
        """Takes in epochs by slot that the directory has forgotten, so that a claim made now is above them.

        Call after joining and after having been cut off, with the epochs of the stand-ins fetched from others.
        """
        claims = {
            slot: LeaseClaim(owner=UNKNOWN_OWNER, epoch=epoch, version=0, expires_at=now)
            for slot, epoch in epochs.items()
            if epoch > 0
        }
        self.observe(now, claims, [])

    def remember(self, now: float, copies: Mapping[int, Copy], rules: Rules) -> None:
        """Takes in what this peer has on disk after a restart.

        What was its own is its own again, unless somebody has it and is at least as far. Owners of the rest have the
        time of a lease to show up in the directory.
        """
        saved = {}
        for slot, copy in copies.items():
            owner, until = (self.me, now) if copy.mine else (UNKNOWN_OWNER, now + rules.lease)
            if copy.epoch > 0:
                saved[slot] = LeaseClaim(owner=owner, epoch=copy.epoch, version=copy.version, expires_at=until)
        self.observe(now, saved, [])
        self.saved = saved


def _since(times: dict[int, float], slot: int, now: float, holds: bool) -> None:
    if holds:
        times[slot] = min(now, times.get(slot, now))  # a clock that was set back starts anew
    else:
        times.pop(slot, None)


@dataclass(frozen=True)
class Situation:
    """How things stand for this peer right now."""

    now: float  # unix seconds
    capacity: int  # slots it can own; 0 when leaving
    desired: Sequence[Sequence[str]]  # desired_owners() of the current directory
    live: Collection[str]  # peers with a live record that can own slots, leaving ones not among them
    leaving: Collection[str]  # peers with a live record that want to be rid of their slots
    held: Mapping[int, int]  # slots this peer owns now, with its epoch
    copies: Mapping[int, Copy]  # standby copies and slots found in its checkpoint
    busy: Collection[int] = ()  # slots with an acquisition under way, which `held` does not show yet
    # `desired` with those that have fallen silent: its standbys may have copies. Called where a slot is abandoned.
    former: Callable[[], Sequence[Sequence[str]]] = tuple


def decide(watch: Watch, situation: Situation, rules: Rules) -> list[Action]:
    """What to do now: yields first, then acquisitions as far as there is room (orphans, free slots, handovers), then
    copies.

    Actions repeat on every call until their effect shows in `held`, `copies` or `busy`; none may be skipped for good.
    """
    urgent: list[Action] = []
    orphans: list[Action] = []
    free: list[Action] = []
    handovers: list[Action] = []
    copies: list[Action] = []
    room = situation.capacity - len(situation.held) - len(set(situation.busy) - set(situation.held))
    for slot, listed in enumerate(situation.desired):
        claim = watch.claims.get(slot)
        if slot in situation.held:
            if claim is not None and (-claim.epoch, claim.owner) < (-situation.held[slot], watch.me):
                urgent.append(_lost_to(claim, situation, slot))
            continue
        if slot in situation.busy:
            continue
        if claim is None:
            if _may_claim(watch, situation, rules, slot):
                free.append(ClaimFree(slot, 1))
        elif _abandoned(watch, situation, slot, claim):
            if room > 0 and _may_take_over(watch, situation, rules, slot, claim):
                asked = dict.fromkeys((*listed, *(situation.former() or situation.desired)[slot]))
                sources = tuple(peer for peer in asked if peer != watch.me)
                copy = situation.copies.get(slot)
                epoch = claim.epoch + (1 if copy is None else COPY_RAISE)
                outdone = _restored(watch, situation, slot, claim) and copy is not None and copy.version < claim.version
                orphans.append(TakeOver(slot, epoch, copy, sources, outdone))
        elif claim.owner != watch.me and room > 0 and _behind(claim, situation.copies.get(slot)):
            orphans.append(TakeOver(slot, claim.epoch + COPY_RAISE, situation.copies[slot], ()))
        elif claim.owner != watch.me:
            wanted = watch.wanted_since.get(slot)
            patience = 0.0 if claim.owner in situation.leaving else rules.settle
            reachable = claim.owner in situation.live or claim.owner in situation.leaving
            if wanted is not None and room > 0:
                if reachable and situation.now >= wanted + patience:
                    handovers.append(RequestHandover(slot, claim.owner, claim.epoch + COPY_RAISE))
            elif reachable and watch.me in listed:
                copy = situation.copies.get(slot)
                # One of a later epoch is of a history that the swarm has lost sight of.
                if copy is None or copy.epoch != claim.epoch or copy.version < claim.version:
                    copies.append(KeepStandby(slot, claim.owner, claim.epoch, claim.version))
            elif slot in situation.copies and situation.now >= (
                watch.unlisted_since.get(slot, math.inf) + rules.keep_unlisted
            ):
                copies.append(DropStandby(slot))
    return urgent + (orphans + free + handovers)[: max(room, 0)] + copies


def grants_handover(watch: Watch, situation: Situation, slot: int, requester: str, epoch: int) -> bool:
    """Whether the owner lets `requester` have the slot: it holds it, and its own directory wants the requester to
    have it.

    Having granted, it freezes the slot. It resumes if no claim at `epoch` shows up within a lease.
    """
    listed = situation.desired[slot]
    return situation.held.get(slot) == epoch - COPY_RAISE and bool(listed) and listed[0] == requester != watch.me


def _lost_to(claim: LeaseClaim, situation: Situation, slot: int) -> Yield | Reclaim:
    """What to do about a claim that wins over this peer's own."""
    epoch = claim.epoch + COPY_RAISE
    if claim.epoch == situation.held[slot] + 1 and situation.capacity and epoch <= MAX_EPOCH:
        return Reclaim(slot, claim.owner, epoch)
    return Yield(slot, claim.owner, claim.epoch)


def _behind(claim: LeaseClaim, copy: Copy | None) -> bool:
    """Whether others restarted the slot while this peer, its owner, was away, and are not as far as its checkpoint.

    Who had never heard of the slot claims it at epoch 1 again; else a restart is one above.
    """
    return copy is not None and copy.mine and claim.epoch - copy.epoch in (0, 1) and claim.version < copy.version


def _abandoned(watch: Watch, situation: Situation, slot: int, claim: LeaseClaim) -> bool:
    """The lease ran out, or it is this peer's own from before a restart."""
    return claim.expires_at <= situation.now or _restored(watch, situation, slot, claim)


def _restored(watch: Watch, situation: Situation, slot: int, claim: LeaseClaim) -> bool:
    """This peer owned the slot, restarted, and found its state on disk: nobody has a better claim."""
    return claim.owner == watch.me and (copy := situation.copies.get(slot)) is not None and copy.epoch >= claim.epoch


def _may_take_over(watch: Watch, situation: Situation, rules: Rules, slot: int, claim: LeaseClaim) -> bool:
    """Whether it is this peer's turn to take an abandoned slot."""
    if _restored(watch, situation, slot, claim):
        return True
    listed = situation.desired[slot]
    copy = situation.copies.get(slot)
    if copy is None:
        return _has_waited(watch, situation, rules, slot, claim.expires_at + (len(listed) + 1) * rules.grace)
    turn = listed.index(watch.me) if watch.me in listed and copy.epoch >= claim.epoch else len(listed)
    return situation.now >= claim.expires_at + turn * rules.grace


def _may_claim(watch: Watch, situation: Situation, rules: Rules, slot: int) -> bool:
    """Whether it is this peer's turn to claim a slot that nobody ever claimed."""
    if slot in watch.wanted_since:
        return situation.now >= watch.wanted_since[slot] + rules.settle
    return _has_waited(watch, situation, rules, slot, watch.free_since[slot] + rules.settle + rules.grace)


def _has_waited(watch: Watch, situation: Situation, rules: Rules, slot: int, first: float) -> bool:
    """Whether it is this peer's turn if all live ones take turns from `first` on: the listed, then others by draw."""
    listed = situation.desired[slot]
    if watch.me in listed:
        return situation.now >= first + listed.index(watch.me) * rules.grace
    if situation.now < first + len(listed) * rules.grace:
        return False  # whoever is next: to compare all peers for every slot would take long
    draws = {peer: draws_of(peer, len(situation.desired))[slot] for peer in (*situation.live, watch.me)}
    before = sum(draw > draws[watch.me] for peer, draw in draws.items() if peer not in listed)
    return situation.now >= first + (len(listed) + before) * rules.grace
