"""Facts of a manifest that cannot be together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .manifest_errors import ManifestError

if TYPE_CHECKING:
    from .manifest import Manifest, OuterSpec


def check(manifest: Manifest) -> None:
    """Raise ManifestError for a run that could not be trained."""
    _check_weights(manifest)
    _check_cadences(manifest.outer)
    if manifest.sketch.kind in ("gradient", "signs"):
        _check_gradient_sketches(manifest)
    if manifest.outer.merge == "radial":
        _check_radial_merge(manifest)


def _check_weights(manifest: Manifest) -> None:
    """Raise ManifestError where an expert could not be made of what travels."""
    kind = manifest.standin.kind
    if manifest.train.expert_weights == "ternary" and kind in ("lowbit", "shared", "chosen"):
        raise ManifestError(
            f"a ternary copy of an expert that is trained ternary is exact and small, and a {kind} stand-in is neither",
            fix="set standin.kind to ternary",
        )
    if kind == "shared" and not manifest.model.bases:
        raise ManifestError(
            "shared stand-ins need a checkpoint whose experts are variants of a few",
            fix="start the run from one that `shoal upcycle` made, or set standin.kind to lowbit",
        )
    if kind == "chosen":
        _check_budgets(manifest)
    if manifest.ownership.snapshot_format == "standin" and not manifest.standin.whole:
        raise ManifestError(
            "narrow stand-ins are not all of an expert, and ownership.snapshot_format says to send nothing else",
            fix="set ownership.snapshot_format to int8, or standin.kind to lowbit",
        )


def _check_budgets(manifest: Manifest) -> None:
    """Raise ManifestError where no form of stand-in is within the budgets for every expert."""
    from ...kernels.bases import Bases  # not above: most commands read manifests without torch
    from ..model.init import expert_shape  # and this needs the present module
    from ..standins.standin_menu import menu_of

    try:
        shape = expert_shape(manifest.model)
        menu_of(manifest.standin, shape.hidden, shape.width, Bases())
    except ValueError as error:
        raise ManifestError(
            f"stand-ins cannot be chosen: {error}", fix="raise standin.bytes_per_weight or standin.flops_fraction"
        ) from error


def _check_cadences(outer: OuterSpec) -> None:
    """Raise ManifestError where fragments would have to hold tensors that are due at different times."""
    cadences = {every or outer.every_steps for every in (0, outer.embeddings_every, outer.router_every)}
    if len(cadences) > outer.fragments:
        raise ManifestError(
            f"the backbone's tiers have {len(cadences)} cadences, but there are {outer.fragments} fragments",
            fix=f"set outer.fragments to {len(cadences)} at least, or fewer different cadences",
        )
    if min(cadences) * outer.growth < 1:
        raise ManifestError(
            f"every {min(cadences)} steps times outer.growth is more than one merge a step at the end",
            fix=f"set outer.growth to {math.ceil(1000 / min(cadences)) / 1000:g} at least",
        )


def _check_gradient_sketches(manifest: Manifest) -> None:
    """Raise ManifestError for what no peer could sketch gradients with."""
    from ...kernels.gradient_sketch import largest_rank  # not above: most commands read manifests without torch
    from ...kernels.sign_sketch import sign_sketch_nbytes
    from ..model.init import expert_shape  # and these need the present module
    from ..sketches.row_memory import MAX_BYTES

    if not manifest.standin.whole:
        raise ManifestError(
            f"{manifest.sketch.kind} sketches need stand-ins as wide as the experts, and narrow ones are not",
            fix="set standin.kind to lowbit or ternary, or sketch.kind to rows",
        )
    try:
        shape = expert_shape(manifest.model)
    except ValueError as error:
        raise ManifestError(f"the model cannot be built: {error}", fix="correct the model's config") from error
    size = sign_sketch_nbytes(shape.hidden, shape.width)
    if manifest.sketch.kind == "signs" and size > MAX_BYTES:
        raise ManifestError(
            f"an expert's sign sketch has {size} bytes, more than the {MAX_BYTES} of a message",
            fix="set sketch.kind to rows or gradient",
        )
    largest = largest_rank(shape.hidden, shape.width)
    if manifest.sketch.kind == "gradient" and manifest.sketch.rank > largest:
        raise ManifestError(
            f"sketch.rank {manifest.sketch.rank} is more than {largest}, all there is to the gradient of such experts",
            fix=f"set sketch.rank to {largest} at most",
        )


def _check_radial_merge(manifest: Manifest) -> None:
    """Raise ManifestError where a fragment has more tensors than a member's facts can have norms."""
    from ...protocol.averaging.facts import MAX_NORMS  # not above: as in `_check_gradient_sketches`
    from ...protocol.averaging.radial import num_norms
    from ..model.cut import backbone_fragments

    try:
        fragments = backbone_fragments(manifest)
    except ValueError as error:
        raise ManifestError(
            f"the backbone cannot be cut: {error}", fix="correct the model or outer.fragments"
        ) from error
    most = max(map(num_norms, fragments))
    if most > MAX_NORMS:
        raise ManifestError(
            f"outer.merge is radial and a fragment has {most} tensors, more than {MAX_NORMS}",
            fix="set outer.fragments higher, or outer.merge to mean",
        )
