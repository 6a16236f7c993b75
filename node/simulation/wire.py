"""How many bytes everything takes on the wire: real messages of the sizes that a preset's model gives, encoded."""

from __future__ import annotations

import msgspec
import torch

from ...kernels.bases import Bases
from ...kernels.gradient_sketch import sketch_numel
from ...kernels.standin import StandIn
from ...protocol import messages
from ...protocol.averaging.facts import MAX_FACTS_BYTES
from ...protocol.directory.records import Lease, LeaseRecord, PeerRecord, Record, VoteRecord
from ...protocol.envelope import ENVELOPE_OVERHEAD
from ...protocol.messages import DeltaBatch, ExpertCounts, RoundOpen, SurrogateDelta
from ..model.cut import backbone_fragments, cadences
from ..model.init import expert_shape
from ..model.presets import preset
from ..run.manifest import Manifest, OwnershipSpec
from ..standins.standin_menu import menu_of

PEER_ID = "12D3KooW" + "A" * 44
ELEMENT_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 4.25 / 8}
SUM_BYTES = 4  # of one element of a row's sum, which is averaged further
OPTIMIZER_BYTES = 12  # a weight with both moments, of a slot in full


def manifest_of(name: str, lease_seconds: float, round_seconds: float) -> Manifest:
    """A run of the preset called `name`, never to be founded."""
    parts = preset(name)
    return Manifest(
        name=name,
        founder=PEER_ID,
        created_at=0,
        model=parts.model,
        data=parts.data,
        train=parts.train,
        outer=msgspec.structs.replace(parts.outer, timeout_seconds=round_seconds),
        standin=parts.standin,
        sketch=parts.sketch,
        ownership=OwnershipSpec(lease_seconds=lease_seconds),
    )


def sealed_bytes(record: Record) -> int:
    """Of a record in its envelope."""
    return len(msgspec.msgpack.encode(record)) + ENVELOPE_OVERHEAD


class Wire:
    """Sizes in bytes.

    Attributes:
        fragments: of each fragment of the backbone as one member's input to an all-reduce.
        sums: of each fragment as a row's sum.
        states: of each fragment with its momentum, as fetched.
        slot: a slot in full.
        standins: all published stand-ins of the run, as a newcomer fetches them.
        delta: one publication of one slot, in gossip.
        counts: what composers gossip about routing with every publication.
        opening: a RoundOpen.
        facts: of one member of a round.
        gradient: one interval's gradient sketches of all slots, in int8, for the same tokens as a `gradient_every`.
    """

    def __init__(self, manifest: Manifest) -> None:
        shape = expert_shape(manifest.model)
        cut = backbone_fragments(manifest)
        self.cadences = cadences(cut, manifest)
        element = ELEMENT_BYTES[manifest.outer.codec]
        self.fragments = [fragment.numel * element for fragment in cut]
        self.sums = [fragment.numel * SUM_BYTES for fragment in cut]
        self.states = [fragment.numel * 8.0 for fragment in cut]
        weights = 3 * shape.hidden * shape.width * shape.num_layers
        gate_up, down = _weights(shape.width, shape.hidden, shape.std)
        menu = menu_of(manifest.standin, shape.hidden, shape.width, Bases([(gate_up, down)]))
        standin = menu.make(menu.forms[0], gate_up, down)
        standin_bytes = len(standin.to_bytes()) * shape.num_layers
        self.slot = float(OPTIMIZER_BYTES * weights + standin_bytes)
        self.standins = float(standin_bytes * shape.num_experts)
        self.delta = self._delta(manifest, standin, shape.num_layers)
        counts = ((1 << 12,) * shape.num_experts,) * shape.num_layers
        self.counts = len(messages.encode(ExpertCounts(1 << 12, counts))) + ENVELOPE_OVERHEAD
        self.opening = len(messages.encode(RoundOpen(1 << 12, 0, 0, 1 << 12))) + ENVELOPE_OVERHEAD
        self.facts = MAX_FACTS_BYTES
        rank = min(manifest.sketch.rank, shape.hidden, shape.width)
        self.gradient = float(sketch_numel(shape.hidden, shape.width, rank) * shape.num_layers * shape.num_experts)

    @staticmethod
    def _delta(manifest: Manifest, standin: StandIn, num_layers: int) -> float:
        """After as many steps of AdamW as lie between two publications, each weight by its learning rate at most."""
        spec = manifest.standin
        moved = manifest.train.learning_rate * manifest.train.expert_rate * spec.publish_every
        generator = torch.Generator().manual_seed(1)
        before = standin.dense()
        after = [w + moved * torch.randn(w.shape, generator=generator).clamp(-1, 1) for w in before]
        extra = {"rank": spec.rank} if standin.kind == "narrow" else {}
        payload = standin.delta(standin.payload_to(*after, **extra))  # type: ignore[attr-defined]  # of every kind
        delta = SurrogateDelta(0, 1, 1 << 12, 1 << 12, (payload,) * num_layers, bytes(16), (0.5,) * num_layers)
        try:
            return len(messages.encode(DeltaBatch((delta,)))) + ENVELOPE_OVERHEAD
        except ValueError:  # too large for gossip: an announcement, and everybody fetches the stand-ins
            return float(len(standin.to_bytes()) * num_layers)


def _weights(width: int, hidden: int, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(shape, generator=generator) for shape in ((2 * width, hidden), (hidden, width)))
    return std * gate_up, std * down


def peer_record(peer_id: str, phase: str, capacity: int, slots: list[int], now: float, lifetime: float) -> PeerRecord:
    """As a composer publishes it."""
    return PeerRecord(
        peer_id=peer_id,
        role="composer",
        phase=phase,
        capacity=capacity,
        transport_addrs=["/ip4/203.0.113.100/tcp/31338/p2p/" + peer_id],
        dht_addrs=["/ip4/203.0.113.100/tcp/31337/p2p/" + peer_id],
        metrics_url="",
        version="0.1.0",
        protocol_version=1,
        step=1 << 12,
        tokens=1 << 24,
        tokens_per_second=1000.0,
        loss=1.0,
        slots=slots,
        round=1 << 10,
        fidelity=0.5,
        issued_at=now,
        expires_at=now + lifetime,
    )


def lease_record(owner: str, leases: list[Lease], issued_at: float, lifetime: float) -> LeaseRecord:
    """All that an owner claims."""
    return LeaseRecord(owner=owner, leases=leases, issued_at=issued_at, expires_at=issued_at + lifetime)


def vote_record(round_: int, fragment: int, digest: bytes, now: float, expires: float) -> VoteRecord:
    """What a composer holds of a fragment; who contributed is left out."""
    return VoteRecord(round=round_, fragment=fragment, digest=digest, members=[], issued_at=now, expires_at=expires)
