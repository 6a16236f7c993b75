"""The backbone's fragments, and when each is due: what `protocol/averaging/fragments.py` makes of a run's manifest."""

from __future__ import annotations

from ...protocol.averaging.cadence import Cadence
from ...protocol.averaging.fragments import Fragment, Tier, partition, tier_of
from ..run.manifest import Manifest, OuterSpec
from .init import backbone_shapes


def backbone_fragments(manifest: Manifest) -> list[Fragment]:
    """Numbered from 0. Raises ValueError where model and `outer` do not fit each other."""
    return partition(backbone_shapes(manifest.model), manifest.outer.fragments, _tiers(manifest.outer))


def cadences(fragments: list[Fragment], manifest: Manifest) -> list[Cadence]:
    """Of each fragment; all its tensors are of tiers with the same one."""
    spec, every = manifest.outer, _tiers(manifest.outer)
    return [
        Cadence.of(f.index, len(fragments), every[tier_of(f.names[0])], spec.growth, manifest.train.steps)
        for f in fragments
    ]


def _tiers(spec: OuterSpec) -> dict[Tier, int]:
    return {
        "embeddings": spec.embeddings_every or spec.every_steps,
        "router": spec.router_every or spec.every_steps,
        "body": spec.every_steps,
    }
