"""What a member of an averaging round says about itself, signed: the only input to averaging weights.

A member signs over its run, round and attempt, so its facts can neither be invented by the group's leader (who passes
them on) nor reused in another round. `base` is the digest of the state that the pseudo-gradient was measured from:
pseudo-gradients from different bases have no common average. For sketches it names the slot and its lease's epoch.
Where norms and directions are merged apart (`radial`), facts carry the norms. Without any they are 9 fields, not 10.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from ..errors import Refused
from ..identity import SIGNATURE_BYTES, verify

if TYPE_CHECKING:
    from ..identity import Identity

MAX_ROUND = (1 << 48) - 1
MAX_ATTEMPT = (1 << 16) - 1
MAX_NORMS = 1024  # 4 kB: one message of the group's leader holds the facts of all 512 members and 4 MiB at most
MAX_FACTS_BYTES = 512  # and the norms
MAX_AGE_SECONDS = 600.0  # far above any round's length; catches a wrong clock and facts kept for later

_DOMAIN = b"shoal/round-facts/1\0"


class RoundFacts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One member's claims for one attempt at one round."""

    peer_id: Annotated[str, Meta(min_length=52, max_length=52)]
    round: Annotated[int, Meta(ge=0, le=MAX_ROUND)]
    attempt: Annotated[int, Meta(ge=0, le=MAX_ATTEMPT)]
    fragment: Annotated[int, Meta(ge=0, le=1 << 20)]
    tokens: Annotated[int, Meta(ge=0, le=1 << 53)]  # trained on since the base; 0: brings nothing, only receives
    steps: Annotated[int, Meta(ge=1, le=1 << 32)]  # inner steps since the base
    base: Annotated[bytes, Meta(min_length=32, max_length=32)]  # e.g. merging.digest of the state before the round
    reduces: bool  # others can dial it, so it averages a share of the parts
    issued_at: float  # unix seconds
    packed_norms: Annotated[bytes, Meta(max_length=4 * MAX_NORMS)] = b""  # little-endian float32; see `norms`

    @property
    def norms(self) -> tuple[float, ...]:
        """Of the pseudo-gradient, one per tensor that is merged by norm and direction: `radial.split`."""
        return struct.unpack(f"<{len(self.packed_norms) // 4}f", self.packed_norms)


def pack_norms(norms: Sequence[float]) -> bytes:
    """For `RoundFacts.packed_norms`. Raises ValueError if they are too many, and on values that float32 has not."""
    if len(norms) > MAX_NORMS:
        raise ValueError(f"{len(norms)} norms, facts hold {MAX_NORMS} at most: cut the backbone into more fragments")
    try:
        return struct.pack(f"<{len(norms)}f", *norms)
    except OverflowError as error:
        raise ValueError(f"norms beyond float32: {error}") from error


def sign_facts(identity: Identity, run_id: str, facts: RoundFacts) -> bytes:
    """64 bytes of Ed25519 signature, then the facts' msgpack."""
    fields = msgspec.structs.astuple(facts)
    payload = msgspec.msgpack.encode(fields if facts.packed_norms else fields[:-1])
    return identity.sign(_signed_bytes(run_id, payload)) + payload


def open_facts(
    data: bytes, run_id: str, peer_id: str, *, like: RoundFacts, now: float, receivers: bool = False
) -> RoundFacts:
    """Verify and decode facts that `peer_id` sent for the same attempt, fragment, base and number of norms as `like`.

    `receivers`: whether facts without tokens are in order.

    Raises:
        BadSignature: `peer_id` did not sign these bytes for this run.
        Refused: malformed, stale, norms that are none, or about another peer, round, attempt, fragment or base.
    """
    if not SIGNATURE_BYTES < len(data) <= MAX_FACTS_BYTES + len(like.packed_norms):
        raise Refused("facts_size", f"{len(data)} bytes cannot be signed facts")
    payload = data[SIGNATURE_BYTES:]
    verify(peer_id, _signed_bytes(run_id, payload), data[:SIGNATURE_BYTES])
    try:
        facts = msgspec.msgpack.decode(payload, type=RoundFacts)
    except msgspec.DecodeError as error:
        raise Refused("facts_malformed", f"{peer_id}'s facts: {error}") from error
    if not facts.tokens and not receivers:
        raise Refused("facts_malformed", f"{peer_id} has trained on no tokens")
    if facts.peer_id != peer_id:
        raise Refused("facts_of_another", f"{peer_id} sent facts about {facts.peer_id}")
    if (facts.round, facts.attempt, facts.fragment) != (like.round, like.attempt, like.fragment):
        raise Refused("facts_of_another_round", f"{peer_id} sent facts of round {facts.round}.{facts.attempt}")
    if facts.base != like.base:
        raise Refused("another_base", f"{peer_id} starts round {facts.round} from another state")
    if len(facts.packed_norms) != len(like.packed_norms):
        theirs, own = len(facts.packed_norms), len(like.packed_norms)
        raise Refused("facts_norms", f"{peer_id}'s norms are {theirs} bytes, this fragment's are {own}")
    if not all(math.isfinite(norm) and norm >= 0 for norm in facts.norms):
        raise Refused("facts_norms", f"{peer_id}'s norms are negative or not finite")
    if not math.isfinite(facts.issued_at) or abs(now - facts.issued_at) > MAX_AGE_SECONDS:
        raise Refused("facts_stale", f"{peer_id}'s facts are {now - facts.issued_at:.0f} s old")
    return facts


def _signed_bytes(run_id: str, payload: bytes) -> bytes:
    name = run_id.encode()
    return _DOMAIN + len(name).to_bytes(2) + name + payload
