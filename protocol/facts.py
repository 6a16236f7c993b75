"""What a member of an averaging round says about itself, signed: the only input to averaging weights.

A member signs over its run, round and attempt, so its facts can neither be invented by the group's leader (who passes
them on) nor reused in another round. `base` is the digest of the state that the pseudo-gradient was measured from:
pseudo-gradients from different bases have no common average. For sketches it names the slot and its lease's epoch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from .errors import Refused
from .identity import SIGNATURE_BYTES, verify

if TYPE_CHECKING:
    from .identity import Identity

MAX_ROUND = (1 << 48) - 1
MAX_ATTEMPT = (1 << 16) - 1
MAX_FACTS_BYTES = 512
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


def sign_facts(identity: Identity, run_id: str, facts: RoundFacts) -> bytes:
    """64 bytes of Ed25519 signature, then the facts' msgpack."""
    payload = msgspec.msgpack.encode(facts)
    return identity.sign(_signed_bytes(run_id, payload)) + payload


def open_facts(
    data: bytes, run_id: str, peer_id: str, *, like: RoundFacts, now: float, receivers: bool = False
) -> RoundFacts:
    """Verify and decode facts that `peer_id` sent for the same attempt, fragment and base as `like`.

    `receivers`: whether facts without tokens are in order.

    Raises:
        BadSignature: `peer_id` did not sign these bytes for this run.
        Refused: malformed, stale, or about another peer, round, attempt, fragment or base.
    """
    if not SIGNATURE_BYTES < len(data) <= MAX_FACTS_BYTES:
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
    if not math.isfinite(facts.issued_at) or abs(now - facts.issued_at) > MAX_AGE_SECONDS:
        raise Refused("facts_stale", f"{peer_id}'s facts are {now - facts.issued_at:.0f} s old")
    return facts


def _signed_bytes(run_id: str, payload: bytes) -> bytes:
    name = run_id.encode()
    return _DOMAIN + len(name).to_bytes(2) + name + payload
