"""What the directory says at one moment: pure data, resolved by rules that every peer applies alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .records import LeaseRecord, PeerRecord, VoteRecord

# A peer that fell silent is remembered for so many of its record's lifetimes. It may be cut off and come back.
ABSENT_LIFETIMES = 15


@dataclass(frozen=True, kw_only=True)
class LeaseClaim:
    """That `owner` holds a slot, until `expires_at` (unix seconds)."""

    owner: str  # peer id
    epoch: int
    version: int  # owner's step of the last snapshot
    expires_at: float


@dataclass(frozen=True, kw_only=True)
class View:
    """The directory at `time`. Everything in it is live, except where a name says otherwise."""

    time: float  # unix seconds
    peers: Mapping[str, PeerRecord] = field(default_factory=dict)  # by peer id
    leases: Mapping[int, LeaseClaim] = field(default_factory=dict)  # by slot; the one owner of each
    votes: Mapping[int, Mapping[str, VoteRecord]] = field(default_factory=dict)  # by fragment, then voter
    distrusted: frozenset[str] = frozenset()  # peers whose leases were left out
    last_holders: Mapping[int, LeaseClaim] = field(default_factory=dict)  # by slot without owner; who held it last
    absent: Mapping[str, PeerRecord] = field(default_factory=dict)  # by peer id; ran out a short time ago


def wins(challenger: LeaseClaim, holder: LeaseClaim) -> bool:
    """Whether the first claim to a slot beats the second: higher epoch, then smaller peer id."""
    return (-challenger.epoch, challenger.owner) < (-holder.epoch, holder.owner)


def claims_of(records: Iterable[LeaseRecord]) -> Iterable[tuple[int, LeaseClaim]]:
    """Every (slot, claim) in lease records."""
    for record in records:
        for lease in record.leases:
            yield (
                lease.slot,
                LeaseClaim(owner=record.owner, epoch=lease.epoch, version=lease.version, expires_at=record.expires_at),
            )


def remember(strongest: dict[int, LeaseClaim], record: LeaseRecord) -> None:
    """Takes a record's claims into the strongest ever seen; a renewal replaces what it renews."""
    for slot, claim in claims_of([record]):
        known = strongest.get(slot)
        if known is None or (known.owner, known.epoch) == (claim.owner, claim.epoch) or wins(claim, known):
            strongest[slot] = claim


def resolve(
    now: float,
    *,
    peers: Iterable[PeerRecord],
    leases: Iterable[LeaseRecord],
    votes: Iterable[tuple[str, VoteRecord]],
    strongest: Mapping[int, LeaseClaim],
    distrusted: frozenset[str] = frozenset(),
) -> View:
    """Build a view from the newest record of each writer.

    A slot belongs to the strongest live claim, unless a stronger one is known to have existed: a deposed owner does not
    come back because its successor went silent. Then nobody owns the slot, and a takeover needs a higher epoch.

    Args:
        now: unix seconds.
        peers: expired ones are absent for a while, then left out of the view.
        leases: expired ones are left out of the view.
        votes: (voter, record).
        strongest: by slot, the strongest claim ever seen.
        distrusted: peers that have no part in `leases` and `strongest`.
    """
    owners: dict[int, LeaseClaim] = {}
    for slot, claim in claims_of(record for record in leases if record.expires_at > now):
        if slot not in owners or wins(claim, owners[slot]):
            owners[slot] = claim
    owners = {
        slot: claim for slot, claim in owners.items() if slot not in strongest or claim.epoch >= strongest[slot].epoch
    }
    by_fragment: dict[int, dict[str, VoteRecord]] = {}
    for voter, vote in votes:
        if vote.expires_at > now:
            by_fragment.setdefault(vote.fragment, {})[voter] = vote
    live, absent = {}, {}
    for peer in peers:
        if peer.expires_at > now:
            live[peer.peer_id] = peer
        elif peer.expires_at + ABSENT_LIFETIMES * (peer.expires_at - peer.issued_at) > now:
            absent[peer.peer_id] = peer
    return View(
        time=now,
        peers=live,
        absent=absent,
        leases=owners,
        votes=by_fragment,
        distrusted=distrusted,
        last_holders={slot: claim for slot, claim in strongest.items() if slot not in owners},
    )
