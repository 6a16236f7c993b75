"""When an outer round is committed. Pure: the directory's votes in, decisions out.

    round r merges fragment r mod P: each fragment counts rounds of its own
    attempt  an all-reduce within a round; a new attempt follows a group that met and failed
    vote     "after round r my fragment has this digest"; a peer's newest vote per fragment is the one that counts
    commit   a quorum of peers voted for the same digest

Two digests cannot both be committed by the same votes: a quorum is more than half of the active peers. Peers that see
other votes (a round tried again after a lost vote), or count other peers (a split network), can disagree until they
meet; then the newer votes' majority holds, and who has another state fetches that one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

MIN_QUORUM = 2
FARTHEST_AHEAD = 1 << 32  # rounds that nobody makes in a lifetime; numbers end at `facts.MAX_ROUND`


class Vote(Protocol):
    """What a tally reads of a vote; the directory's VoteRecord has it."""

    @property
    def round(self) -> int: ...
    @property
    def fragment(self) -> int: ...
    @property
    def digest(self) -> bytes: ...


V = TypeVar("V", bound=Vote)


@dataclass(frozen=True)
class Verdict:
    """One round's count. `dissenters` voted for another digest than the committed one; empty without a commit."""

    committed: bytes | None
    supporters: tuple[str, ...] = ()
    dissenters: tuple[str, ...] = ()


def quorum(active: int) -> int:
    """How many of `active` composers must agree to commit: more than half, and at least two."""
    return max(MIN_QUORUM, majority(active))


def majority(active: int) -> int:
    """How many of `active` composers are more than half."""
    return active // 2 + 1


def fragment_of(round_: int, fragments: int) -> int:
    """The fragment that a round merges."""
    return round_ % fragments


def next_round(fragment: int, last: int, fragments: int) -> int:
    """The round that follows round `last` of a fragment; after -1, its first one."""
    return fragment if last < 0 else last + fragments


def tally(votes: Mapping[str, Vote], round_: int, fragments: int, quorum_size: int) -> Verdict:
    """Count the votes of one round, one per peer id; votes of other rounds or another fragment do not count."""
    counted = {
        peer_id: vote.digest
        for peer_id, vote in votes.items()
        if vote.round == round_ and vote.fragment == fragment_of(round_, fragments)
    }
    backing = Counter(counted.values())
    winners = [digest for digest, count in backing.items() if count >= quorum_size]
    if len(winners) != 1:  # two only if quorum_size is no majority: then neither may count
        return Verdict(committed=None)
    supporters = tuple(sorted(peer_id for peer_id, digest in counted.items() if digest == winners[0]))
    dissenters = tuple(sorted(peer_id for peer_id, digest in counted.items() if digest != winners[0]))
    return Verdict(winners[0], supporters, dissenters)


def latest_commit(votes: Iterable[Mapping[str, Vote]], fragments: int, quorum_size: int) -> int | None:
    """The highest round that any fragment's votes commit; None before the first. One mapping per fragment."""
    best: int | None = None
    for by_peer in votes:
        counted = Counter(vote.round for vote in by_peer.values())  # once, however many rounds peers are apart
        for round_, count in counted.items():
            if count < quorum_size or (best is not None and round_ <= best):
                continue
            if tally(by_peer, round_, fragments, quorum_size).committed is not None:
                best = round_
    return best


def possible(votes: Mapping[str, V], fragment: int, last: int, fragments: int) -> dict[str, V]:
    """Votes for rounds that a fragment has, and that can have been made where its round `last` is the last known.

    Where no quorum decides, one vote may: after another fragment's number, or the last one there is, no round follows.
    """
    return {
        peer_id: vote
        for peer_id, vote in votes.items()
        if fragment_of(vote.round, fragments) == fragment and vote.round <= last + FARTHEST_AHEAD
    }


def most_held(votes: Mapping[str, Vote]) -> tuple[int, bytes] | None:
    """(round, digest) of the state that most voters hold; of equally many the latest, then the greater digest's.

    For peers that came back from disk with different rounds: no quorum can form among them, and all must choose alike.
    """
    held = Counter((vote.round, vote.digest) for vote in votes.values())
    return max(held, key=lambda state: (held[state], state)) if held else None
