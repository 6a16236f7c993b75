"""The manifest: the immutable facts that all peers of a run share. Its hash names the run; the founder signs it.

Canonical bytes are msgpack with sorted keys: floats are their eight IEEE bytes, so that no printing routine's rounding
or exponent style can change a run's name. Integers given for float fields become floats first.

Errors are in `manifest_errors.py`; what facts cannot be together, in `manifest_checks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ...protocol.directory.records import (
    MAX_FRAGMENTS,
    MAX_MANIFEST_BYTES,
    manifest_digest,
    manifest_to_sign,
    open_signed_manifest,
    seal_manifest,
)
from ...protocol.envelope import decode_payload
from ...protocol.errors import BadSignature, Refused
from ...protocol.identity import Identity
from ...protocol.identity import verify as verify_signature
from ..errors import ConfigError
from .manifest_checks import check
from .manifest_errors import ManifestError, ManifestOversized, ManifestTampered, ProtocolMismatch, UnknownFields

PROTOCOL_VERSION = 1

_ASK_AGAIN = "fetch it again; if that does not help, ask the run's founder for a new invite"

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1e12)]
NonNegative = Annotated[float, Meta(ge=0.0, le=1e12)]


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the manifest's parts: immutable, keyword-only, unknown fields refused."""


class ExpertShape(Spec, frozen=True, kw_only=True):
    """What all routed experts of a model have in common."""

    num_layers: Annotated[int, Meta(ge=1, le=1 << 16)]  # MoE layers that have slots: those that are not private
    num_experts: Annotated[int, Meta(ge=1, le=1 << 20)]  # per layer, i.e. slots
    hidden: Annotated[int, Meta(ge=1, le=1 << 20)]
    width: Annotated[int, Meta(ge=1, le=1 << 20)]
    act: Annotated[str, Meta(max_length=64)]  # of the gate, a transformers activation name
    std: NonNegative  # of initial weights


class ModelSpec(Spec, frozen=True, kw_only=True):
    """What is trained."""

    config: dict[str, Any]  # a transformers config by value, with its `model_type`
    # What follows from `config`, so that peers without a backbone need not import transformers; composers check it.
    experts: ExpertShape | None = None
    seed: int = 0  # initial weights are a pure function of it
    capacity_factor: NonNegative = 0.0  # tokens per expert over the even share; 0 = never drop
    # The experts of so many MoE layers, counted from the input, are backbone: every composer has them in full, and no
    # slot, stand-in or sketch of them exists. Layers of slots are counted from 0 after them.
    private_layers: Annotated[int, Meta(ge=0, le=1 << 16)] = 0
    start: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""  # sha256 of the seed's index; empty: from `seed`
    bases: Annotated[int, Meta(ge=0, le=1 << 20)] = 0  # in the seed, of a layer at most: what its experts vary on


class DataSpec(Spec, frozen=True, kw_only=True):
    """What it is trained on."""

    corpus: str = "stdlib"  # `stdlib`: Python's own library sources; a peer may point at its own text instead
    tokenizer: Literal["bytes", "seed"] = "bytes"  # `seed`: of the checkpoint that the run starts from
    context_length: Count = 256  # tokens a sequence


class TrainSpec(Spec, frozen=True, kw_only=True):
    """Inner training, the same for every composer."""

    steps: Count = 1000  # a composer stops training after this many own steps
    min_composers: Count = 1  # nobody trains before this many composers are in the run
    batch_size: Count = 4  # sequences per composer and step
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: Positive = 3e-3
    expert_rate: Positive = 1.0  # experts' learning rate, over learning_rate
    vector_rate: Positive = 1.0  # the same of all that is no matrix: norms and biases
    warmup_steps: Annotated[int, Meta(ge=0, le=1 << 31)] = 50
    final_lr_fraction: Fraction = 0.1  # of learning_rate, reached by a cosine at `steps`
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: NonNegative = 0.1  # matrices only
    expert_weights: Literal["full", "ternary"] = "full"  # what routed experts compute with; masters are float32
    grad_clip: Positive = 1.0  # global norm over backbone and owned experts
    balance_coef: NonNegative = 0.01  # load-balance loss over swarm-wide counts
    z_coef: NonNegative = 0.001  # router z-loss
    bias_rate: NonNegative = 0.0  # how far selection biases move a step towards even load, where a router has them


class OuterSpec(Spec, frozen=True, kw_only=True):
    """Merging the backbone."""

    fragments: Annotated[int, Meta(ge=1, le=MAX_FRAGMENTS)] = 2  # balanced subsets of the backbone, merged in turn
    every_steps: Count = 8  # H: each fragment is merged once per H inner steps
    embeddings_every: Annotated[int, Meta(ge=0, le=1 << 31)] = 0  # H of embeddings and output head; 0 = every_steps
    router_every: Annotated[int, Meta(ge=0, le=1 << 31)] = 0  # H of routers and norms; 0 = every_steps
    growth: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0  # H at the last step over that at the first
    in_flight: Count = 2  # fragments that are merged at the same time
    overlap_steps: Annotated[int, Meta(ge=0, le=1 << 31)] = 0  # tau: a round's share of steps; 0 = in_flight * H / P
    learning_rate: Positive = 1.0  # 1.0 with momentum 0 is the plain token-weighted mean
    momentum: Fraction = 0.0  # Nesterov
    merge: Literal["mean", "radial"] = "mean"  # embeddings and head always by the mean (protocol/averaging/radial.py)
    robust: bool = False  # averages that a minority of liars cannot move far (protocol/averaging/robust.py)
    codec: Literal["float32", "float16", "int8", "int4"] = "float16"  # of pseudo-gradients on the wire
    matchmaking_seconds: Positive = 5.0  # how long a round looks for a quorum, and waits for stragglers at most
    timeout_seconds: Positive = 30.0  # after which a round has failed

    @property
    def mean_every(self) -> float:
        """H on average over a run's rounds."""
        return self.every_steps * ((self.growth - 1) / math.log(self.growth) if self.growth != 1 else 1.0)


class StandInSpec(Spec, frozen=True, kw_only=True):
    """What a composer runs in place of an expert it does not own."""

    # `shared`: the experts' common ancestor and low-rank corrections, of a run that starts from a checkpoint.
    # `chosen`: each expert's owner chooses among all kinds, by measured error and load, within the budgets below.
    kind: Literal["lowbit", "narrow", "ternary", "shared", "chosen"] = "lowbit"
    width_fraction: Fraction = 0.25  # narrow: width over the expert's
    rank: Count = 8  # narrow: of published deltas
    base_rank: Count = 32  # shared: of corrections; chosen ones have it or a quarter of it
    publish_every: Count = 8  # owner's steps between deltas
    replay_rows: Count = 2048  # narrow, chosen: routed inputs kept per expert
    refit_steps: Count = 8  # narrow: optimizer steps per refit
    refit_learning_rate: Positive = 3e-3
    bytes_per_weight: Positive = 0.5625  # chosen: memory of an owner's stand-ins, over the weights of its experts
    flops_fraction: Fraction = 0.5  # chosen: what they cost, over what its experts would, for the tokens routed to them
    choose_every: Count = 32  # chosen: deltas between choices; every expert is tried once in between
    trial_steps: Count = 64  # chosen: optimizer steps of a narrow one that is tried

    @property
    def whole(self) -> bool:
        """Whether every neuron of an expert is in what stands in for it."""
        return self.kind not in ("narrow", "chosen")


class SketchSpec(Spec, frozen=True, kw_only=True):
    """How composers tell the owners of experts what their tokens teach (docs/sketches.md)."""

    kind: Literal["none", "rows", "signs", "gradient"] = "rows"
    every: Count = 1  # inner steps between row sketches
    codec: Literal["int8", "float16", "int4"] = "int8"  # of rows
    budget_bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = 0  # rows of one composer and interval; 0 = all of them
    max_age: Count = 32  # published versions of a stand-in; older sketches are dropped
    kappa: Annotated[float, Meta(ge=-1.0, le=1e6)] = -1.0  # of the correction; -1 follows each sketch's fidelity
    curvature: Literal["isotropic", "diagonal", "full"] = "isotropic"  # of the correction
    patience_seconds: Positive = 1.0  # a worker steps an expert without the composers that it has not heard for so long
    rank: Count = 16  # of gradient sketches
    gradient_every: Count = 24  # inner steps between gradient or sign sketches

    @property
    def goes_to_owners(self) -> bool:
        """Whether each composer sends its own to the owners, not a sum with all others'."""
        return self.kind in ("rows", "signs")

    @property
    def interval(self) -> int:
        """Inner steps between sketches."""
        return self.every if self.kind == "rows" else self.gradient_every


class OwnershipSpec(Spec, frozen=True, kw_only=True):
    """Who holds which slot."""

    replication: Count = 2  # one owner and replication - 1 standbys
    lease_seconds: Positive = 20.0
    snapshot_every: Count = 50  # owner's steps between snapshots for standbys
    # What newcomers and standbys get: `full` is float32 with optimizer state, the others are weights only, and of those
    # `standin` is no more than what has been published.
    snapshot_format: Literal["full", "bfloat16", "int8", "nf4", "ternary", "standin"] = "full"
    handover: Literal["full", "snapshot"] = "full"  # what the next owner gets of one that is still there


class PrivacySpec(Spec, frozen=True, kw_only=True):
    """What keeps workers from reading composers' text; see also `ModelSpec.private_layers`."""

    # Of the key that names experts towards workers, in hex (`protocol.handles.key_digest`); empty without such a key.
    handle_key_digest: Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{64})?\Z")] = ""


class TrustSpec(Spec, frozen=True, kw_only=True):
    """How owners are audited (docs/trust.md)."""

    audit_every: Annotated[int, Meta(ge=0, le=1 << 31)] = 200  # own steps between a composer's audits; 0 = never
    # Of a recomputed update, in norm: what machines that add up in another order may differ by.
    tolerance: Positive = 1e-2
    # Of a published stand-in on routed rows: an honest narrow one may be hardly better than nothing early on, another
    # expert's is worse than nothing.
    min_fidelity: Annotated[float, Meta(ge=-1e6, le=1.0)] = 0.02


class Manifest(Spec, frozen=True, kw_only=True):
    """All of it. Canonical bytes are hashed into the run id and signed by `founder`."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,31}\Z")]
    founder: str  # peer id of the founder's key
    created_at: Annotated[int, Meta(ge=0)]  # unix seconds
    model: ModelSpec
    protocol_version: int = PROTOCOL_VERSION
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    outer: OuterSpec = OuterSpec()
    standin: StandInSpec = StandInSpec()
    sketch: SketchSpec = SketchSpec()
    ownership: OwnershipSpec = OwnershipSpec()
    privacy: PrivacySpec = PrivacySpec()
    trust: TrustSpec = TrustSpec()


@dataclass(frozen=True)
class Run:
    """A run, by the manifest that its founder has signed, verified."""

    run_id: str
    manifest: Manifest
    signed: bytes  # as it is stored and sent


class _Header(msgspec.Struct):
    """What is readable in every protocol version."""

    founder: str
    protocol_version: int


_decoder = msgspec.msgpack.Decoder(Manifest)
_header_decoder = msgspec.msgpack.Decoder(_Header)
_encoder = msgspec.msgpack.Encoder(order="sorted")


def with_settings(manifest: Manifest, settings: Sequence[str]) -> Manifest:
    """A manifest with some facts replaced, each setting like `sketch.kappa=20`. Raises ConfigError."""
    facts: dict[str, Any] = msgspec.to_builtins(manifest)
    for setting in settings:
        path, equals, text = setting.partition("=")
        part, dot, name = path.partition(".")
        known = facts.get(part)
        if not equals or not dot or not isinstance(known, dict) or name not in known:
            raise ConfigError(
                f"{setting!r} is no fact of a manifest",
                fix=f"take one of {part}'s: {', '.join(known)}"
                if equals and dot and isinstance(known, dict)
                else "write it like sketch.budget_bytes=200000",
            )
        facts[part][name] = text
    try:
        return msgspec.convert(facts, Manifest, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a setting is not possible: {error}", fix="correct that value") from error


def canonical_bytes(manifest: Manifest) -> bytes:
    """The bytes that are hashed and signed; equal manifests give equal bytes. Raises ManifestError if it is invalid."""
    try:
        # Decoding applies the types and bounds, which constructing does not.
        data: bytes = _encoder.encode(_decode(_encoder.encode(manifest)))
    except OverflowError as error:
        raise ManifestError("a number of the manifest takes more than 64 bits", fix="give a smaller one") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestOversized(f"the manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    return data


def run_id_of(manifest: Manifest) -> str:
    """The run's name: the manifest's, a dash, and 12 hex digits of the sha256 of its canonical bytes."""
    return f"{manifest.name}-{manifest_digest(canonical_bytes(manifest))}"


def sign(identity: Identity, manifest: Manifest) -> bytes:
    """The signed manifest as it is stored and sent. Only the founder named in it can sign it."""
    if identity.peer_id != manifest.founder:
        raise ManifestError(f"the founder is {manifest.founder}, not {identity.peer_id}", fix="use the founder's key")
    data = canonical_bytes(manifest)
    return seal_manifest(data, identity.sign(manifest_to_sign(data)))


def verify(signed: bytes, expected_run_id: str | None = None) -> Manifest:
    """The manifest inside, verified: see `read_signed`."""
    return read_signed(signed, expected_run_id).manifest


def read_signed(signed: bytes, expected_run_id: str | None = None) -> Run:
    """Check a signed manifest: size, hash, signature, protocol version, fields; in that order.

    Args:
        signed: from `sign`, possibly by way of strangers.
        expected_run_id: what the invite says; None for a file that one trusts, where only the signature is checked.

    Raises the error of the first check that fails, all of them ManifestErrors.
    """
    try:
        record = open_signed_manifest(signed)
    except Refused as error:
        kind = ManifestOversized if error.reason == "oversized" else ManifestError
        raise kind(error.cause, fix=_ASK_AGAIN) from error
    data = record.manifest
    if expected_run_id is not None and not expected_run_id.endswith(f"-{manifest_digest(data)}"):
        raise ManifestTampered(
            f"a manifest with hash {manifest_digest(data)} is not that of the run {expected_run_id}", fix=_ASK_AGAIN
        )
    try:
        header = decode_payload(_header_decoder, data, "manifest")
    except Refused as error:
        raise ManifestError(error.cause, fix=_ASK_AGAIN) from error
    try:
        verify_signature(header.founder, manifest_to_sign(data), record.signature)
    except BadSignature as error:
        raise ManifestTampered(f"the manifest was not signed by its founder: {error.cause}", fix=_ASK_AGAIN) from error
    if header.protocol_version != PROTOCOL_VERSION:
        theirs = header.protocol_version
        raise ProtocolMismatch(
            f"the run speaks protocol {theirs}, this software speaks protocol {PROTOCOL_VERSION}",
            fix=f"use the image tagged `protocol-{theirs}`, or pip-install the shoal release for protocol {theirs}",
        )
    manifest = _decode(data)
    if _encoder.encode(manifest) != data:
        raise ManifestError("the manifest is not in canonical form", fix=_ASK_AGAIN)
    run_id = f"{manifest.name}-{manifest_digest(data)}"
    if expected_run_id not in (None, run_id):
        raise ManifestTampered(f"this manifest is of the run {run_id}, not {expected_run_id}", fix=_ASK_AGAIN)
    return Run(run_id, manifest, signed)


def _decode(data: bytes) -> Manifest:
    try:
        manifest = decode_payload(_decoder, data, "manifest")
    except Refused as error:
        if "unknown field" in error.cause:
            raise UnknownFields(error.cause, fix="use the software version that founded the run") from error
        raise ManifestError(error.cause, fix="correct that field, or use the version that founded the run") from error
    check(manifest)
    return manifest
