"""What a round's all-reduce came to, and the records that carry it out of the averager's process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import msgspec
from torch import Tensor

from .facts import RoundFacts


class Status(Enum):
    """Only COMPLETE has an average. After PARTIAL and REFUSED raise `attempt`; after NO_GROUP keep it."""

    COMPLETE = "complete"  # every element averages every member
    PARTIAL = "partial"  # a member's input or a reducer's answer is missing somewhere; others may see COMPLETE
    NO_GROUP = "no_group"  # fewer than a quorum met before the window ended
    TIMED_OUT = "timed_out"  # a group met, and the all-reduce did not end in time
    REFUSED = "refused"  # nothing was exchanged: own input is not finite or too large, or a member's facts are wrong


@dataclass(frozen=True)
class Outcome:
    """One attempt at one round, as this member saw it.

    Attributes:
        average: float32, shape (fragment's numel,), bit-equal for all members that are COMPLETE; None otherwise.
        members: peer ids of the group, in the order that the all-reduce used; empty without a group.
        facts: the members' verified facts, in the same order.
        failed: peer id to reason, for whoever kept the round from completing. Hand its keys to the next attempt's
            `avoid`, or let the directory drop the peer.
        proven, suspicion: what `reputation.Reputation` is to hear of the round.
        fraction: of the fragment's elements, how many average every member.
        seconds: from submit to outcome; `matchmaking_seconds` of them to find the group, and `quorum_seconds` of these
            until a quorum was there, as far as this member knows.
        bytes_sent, bytes_received: encoded parts only.
    """

    status: Status
    round: int
    attempt: int
    average: Tensor | None = None
    members: tuple[str, ...] = ()
    facts: tuple[RoundFacts, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    proven: tuple[str, ...] = ()
    suspicion: Mapping[str, float] = field(default_factory=dict)
    fraction: float = 0.0
    seconds: float = 0.0
    matchmaking_seconds: float = 0.0
    quorum_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    detail: str = ""


class Order(msgspec.Struct, frozen=True):
    """Parent to averager process: run one attempt. The input lies in the fragment's shared buffer.

    `grace`: seconds that a group with a quorum waits for the others, if this peer leads it. `receiver`: peer id of the
    one member that may, and must, be in the group without tokens; empty if there is none.
    """

    ticket: int
    own: RoundFacts
    signed_facts: bytes
    expected: int
    quorum: int
    grace: float
    avoid: frozenset[str]
    receiver: str = ""


class Report(msgspec.Struct, frozen=True):
    """Averager process to parent: what became of an order. The average lies in the fragment's shared buffer."""

    ticket: int
    status: Status
    detail: str = ""
    members: tuple[str, ...] = ()
    facts: tuple[RoundFacts, ...] = ()
    failed: dict[str, str] = {}
    proven: tuple[str, ...] = ()
    suspicion: dict[str, float] = {}
    whole: int = 0  # elements averaged over every member
    matchmaking_seconds: float = 0.0
    quorum_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
