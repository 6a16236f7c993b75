"""Averaging sketches of gradients on the way to a slot's owner: composers' sums become one mean over all their tokens.

    u_c = sketch_c / tokens_c                      what composer c brings; sketch_c is a sum over its tokens
    u   = sum_c w_c u_c / sum_c w_c                what every member gets, the owner too, who brings nothing
    w_c = min(tokens_c, 3 * median of tokens)      from signed facts; uncapped, u = sum_c sketch_c / sum_c tokens_c

A sketch is linear in the gradient, so the owner rebuilds from `u` as from one composer's, and `credited_tokens` says
for how many tokens it stands. Each slot has its own groups: a bucket by slot and interval, a base that names the owner
and its lease. The owner asks for averages with empty parts, so it uploads only what it reduces itself.

A round that did not complete is not tried again, and what its members brought is lost: the next interval has other
projections (`sketch_intervals.py`), so sums of the two do not add up. Members can disagree about whether a round did
complete; a sum is then lost that its composer believes to be delivered, but none ever counts twice.

Rejected: hivemind's auxiliary peers (they reduce but get nothing back); a composer that collects for the owner (one
peer's uplink carries all, and nobody can tell what it added); one round for all slots (each has another receiver).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from concurrent.futures import Future

from hivemind.dht import DHT
from torch import Tensor

from ..identity import Identity
from ..pacing import UNLIMITED, Pace
from .averaging import Averager
from .facts import MAX_ROUND
from .fragments import Fragment
from .merging import Weighting, weights
from .outcome import Outcome, Status
from .parts import PART_BYTES, CodecName

_BASE_DOMAIN = b"shoal/slot-sketch/1\0"


class SketchAverager(Averager):
    """One averager process for the sketches of all slots. Construct it like `OuterAverager`, right after that.

    Rounds of different slots run at the same time; each slot has at most one. A slot's shared vector takes memory from
    its first round on.

    Args:
        num_slots, numel: how many vectors there are, and float32 elements in each.
        sketcher: names everything else that must be equal for sketches to be summable, e.g. "rank 16". Peers
            with another one do not meet.
        codec: of parts on the wire. Means over tokens are small, and float16 loses what is below 6e-8; int8 has scales.
        matchmaking_seconds, timeout_seconds: as for `OuterAverager`.
    """

    purpose = "sketch"
    weighting = Weighting.TOKENS

    def __init__(
        self,
        *,
        dht: DHT,
        identity: Identity,
        run_id: str,
        num_slots: int,
        numel: int,
        sketcher: str,
        codec: CodecName,
        matchmaking_seconds: float,
        timeout_seconds: float,
        part_bytes: int = PART_BYTES,
        pace: Pace = UNLIMITED,
    ) -> None:
        if num_slots < 1 or numel < 1:
            raise ValueError(f"{num_slots} slots of {numel} elements")
        self.num_slots = num_slots
        super().__init__(
            dht=dht,
            identity=identity,
            run_id=run_id,
            fragments=[
                Fragment(slot, (f"sketch of slot {slot}: {sketcher}",), (numel,), numel) for slot in range(num_slots)
            ],
            codec=codec,
            matchmaking_seconds=matchmaking_seconds,
            timeout_seconds=timeout_seconds,
            part_bytes=part_bytes,
            pace=pace,
        )

    def submit(
        self,
        slot: int,
        interval: int,
        sketch: Tensor | None,
        *,
        tokens: int,
        expected: int,
        owner: str,
        epoch: int = 0,
        avoid: Collection[str] = (),
    ) -> Future[Outcome]:
        """Take part in the round of `slot` and `interval`. Does not block.

        Args:
            sketch: sum over this composer's tokens, shape (numel,), any float dtype and device; copied before this
                returns. None for the owner.
            tokens: that the sketch stands for, whether or not they were routed to this slot; 0 for the owner.
            expected: members after which the round starts at once: composers and the owner.
            owner: peer id of the slot's owner; a group that it has not joined yields nothing.
            epoch: of the owner's lease. Members that name another owner or epoch do not meet.
            avoid: peer ids not to meet.

        Returns a future like `OuterAverager.submit`. If its outcome is COMPLETE, `average` is the mean over tokens,
        and `credited_tokens` says over how many. Raises ValueError on bad arguments, RoundFailed if the slot's last
        round still runs.
        """
        return self._submit(
            self._round(slot, interval),
            0,
            None if sketch is None else sketch.detach().float() / max(1, tokens),
            tokens=tokens,
            steps=1,
            expected=expected,
            quorum=2,
            grace=math.inf,  # who is missing here is missing in the expert's step
            base=_base(slot, owner, epoch),
            avoid=avoid,
            receiver=owner,
        )

    def _round(self, slot: int, interval: int) -> int:
        if not 0 <= slot < self.num_slots or not 0 <= interval < MAX_ROUND // self.num_slots:
            raise ValueError(f"no slot {slot} of {self.num_slots}, or no interval {interval}")
        return interval * self.num_slots + slot


def credited_tokens(outcome: Outcome) -> float:
    """Tokens that a complete round's average stands for: the sum of what members claim, each at most 3 medians.

    Raises ValueError if the round is not complete.
    """
    if outcome.status is not Status.COMPLETE:
        raise ValueError(f"the round is {outcome.status.value}")
    return sum(weights(outcome.facts, weighting=Weighting.TOKENS).values())


def _base(slot: int, owner: str, epoch: int) -> bytes:
    return hashlib.sha256(_BASE_DOMAIN + f"{slot} {epoch} {owner}".encode()).digest()
