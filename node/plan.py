"""`shoal plan`: what a run of a model asks of a machine, computed from its config alone; nothing is loaded."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from .config import ExpertModeName, parse_gib
from .errors import ConfigError

if TYPE_CHECKING:
    from .learning.expert_mode import ExpertMode
    from .run.manifest import Manifest

GIB = 1 << 30
PROCESSES = 1.5 * GIB  # libraries of a peer's processes, before any model


@dataclass(frozen=True)
class Plan:
    """What one peer of a run needs; bytes, unless said otherwise."""

    backbone_weights: int
    expert_weights: int  # all routed ones
    active_weights: int  # that one token meets
    slots: int
    slot_weights: int  # of one expert in every layer
    backbone: int  # a composer's memory for it
    standins: int  # and for all stand-ins
    sketches: int  # and at most for sketches that wait for owners
    slot: int  # and for each slot that it owns; a worker's too
    composer_slots: int  # that fit the memory of a composer; -1: not even one that owns nothing fits
    worker_slots: int  # that fit a worker's
    join: int  # download of a composer that comes late: backbone and stand-ins
    sketches_per_token: float  # upload, if it sends all rows
    rounds_per_token: float  # up and down together


def plan_of(
    manifest: Manifest, memory_gib: float, composers: int, *, mode: ExpertMode | None = None, device: str = "cpu"
) -> Plan:
    """The plan for a peer with so much memory, in a run of so many composers that share the experts evenly.

    Raises ValueError for a model that cannot be built.
    """
    import torch

    from ..kernels.sketch import bytes_per_token
    from ..protocol.averaging.parts import PartCodec
    from .capacity import BACKBONE_BYTES, bases_bytes, slot_bytes, standin_bytes, working_bytes
    from .learning.expert_mode import ExpertMode
    from .model.init import backbone_shapes, expert_shape, experts_per_token
    from .sketches.row_memory import collected_bytes

    shape = expert_shape(manifest.model)
    mode = mode or ExpertMode(manifest.train)
    mode.require_rank(shape.hidden, shape.width)
    spec, outer = manifest.standin, manifest.outer
    top_k = experts_per_token(manifest.model)
    backbone = sum(math.prod(size) for size in backbone_shapes(manifest.model).values())
    slot_weights = 3 * shape.hidden * shape.width * shape.num_layers
    standin = standin_bytes(shape, spec)
    slot = slot_bytes(shape, spec, torch.device(device), mode)
    memory = memory_gib * GIB - working_bytes(shape, mode) - (PROCESSES if device == "cpu" else 0)
    standins = standin * shape.num_experts + bases_bytes(manifest.model, spec)
    sketches = collected_bytes(manifest)
    room = memory - BACKBONE_BYTES * backbone - standins - sketches
    owned_share = 1 / composers
    tokens_per_step = manifest.train.batch_size * manifest.data.context_length
    rounds = 2 * PartCodec(outer.codec).encoded_bytes(backbone) / (outer.mean_every * tokens_per_step)
    return Plan(
        backbone_weights=backbone,
        expert_weights=slot_weights * shape.num_experts,
        active_weights=backbone + top_k * slot_weights,
        slots=shape.num_experts,
        slot_weights=slot_weights,
        backbone=BACKBONE_BYTES * backbone,
        standins=standins,
        sketches=sketches,
        slot=slot,
        composer_slots=-1 if room < 0 else min(shape.num_experts, int(room // max(1, slot - standin))),
        worker_slots=min(shape.num_experts, max(0, int(memory // slot))),
        join=8 * backbone + standin * shape.num_experts,
        sketches_per_token=bytes_per_token(
            shape.hidden, manifest.sketch.codec, top_k=top_k, num_moe_layers=shape.num_layers, owned_share=owned_share
        ),
        rounds_per_token=rounds,
    )


def _gib_from_tokens(_: object, tokens: Sequence[Any]) -> float:
    return parse_gib(tokens[0].value)


def plan(
    model: str,
    *,
    memory: Annotated[float, Parameter(metavar="24GB", converter=_gib_from_tokens)] = 24.0,
    device: Literal["cpu", "cuda"] = "cpu",
    expert_mode: ExpertModeName = "full",
    lora_rank: int = 16,
    composers: int = 8,
    tokens_per_second: float | None = None,
    set_: Annotated[
        tuple[str, ...], Parameter(name="--set", metavar="PART.FIELD=VALUE", negative=(), show_default=False)
    ] = (),
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Say what a run of a model asks of a peer: memory, slots that fit, traffic.

    It computes from the model's config alone. Activations come on top, by batch and length.

        shoal plan small --memory 8
        shoal plan ./moe --memory 24GB --device cuda --expert-mode lora
        shoal plan ./moe --memory 24GB --composers 16 --tokens-per-second 2000

    Parameters
    ----------
    model:
        A preset, or the folder of a Mixture-of-Experts checkpoint.
    memory:
        What the peer may use: 24GB, 24GiB; a bare number is GiB.
    device:
        Where it trains. On a GPU no libraries and no checkpoint being written take room.
    expert_mode:
        How it trains the experts that it owns, as for `join`.
    lora_rank:
        Rank of the factors of `lora`.
    composers:
        How many of them share the experts evenly.
    tokens_per_second:
        Of one composer; `shoal status` and `./dev bench step` say yours. With it, traffic is per hour too.
    set_:
        Facts of the manifest, as for `found`.
    json:
        Print the numbers as JSON.
    """
    if composers < 1:
        raise ConfigError(f"--composers {composers} share nothing", fix="give 1 or more")
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise ConfigError(f"--tokens-per-second {tokens_per_second:g} is no speed", fix="give a number above 0")
    manifest = _manifest(model, set_)
    from .learning.expert_mode import ExpertMode

    mode = ExpertMode(manifest.train, expert_mode, lora_rank)
    try:
        found = plan_of(manifest, memory, composers, mode=mode, device=device)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{model} is no model to train: {error}",
            fix="give a preset, or a checkpoint of a MoE family; `shoal upcycle` makes one of a dense checkpoint",
        ) from error
    if json:
        print(jsonlib.dumps(asdict(found), indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _lines(found, memory, composers, tokens_per_second):
        table.add_row(name, value)
    Console().print(table)
    return 0


def _manifest(model: str, settings: tuple[str, ...]) -> Manifest:
    from .model.presets import PRESETS, preset
    from .run.manifest import Manifest, ModelSpec, with_settings

    if model in PRESETS:
        chosen = preset(model)
        spec = chosen.model
    elif (Path(model) / "config.json").is_file():
        chosen = preset("small")
        try:
            spec = ModelSpec(config=jsonlib.loads((Path(model) / "config.json").read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(f"{model} has a damaged config.json: {error}", fix="download it again, whole") from error
    else:
        raise ConfigError(f"{model} is no preset and no checkpoint", fix=f"give {', '.join(PRESETS)} or a folder")
    manifest = Manifest(
        name="plan", founder="none", created_at=0, model=spec, data=chosen.data, train=chosen.train,
        outer=chosen.outer, standin=chosen.standin, sketch=chosen.sketch,
    )  # fmt: skip
    return with_settings(manifest, settings)


def _lines(found: Plan, memory: float, composers: int, speed: float | None) -> list[tuple[str, str]]:
    share = -(-found.slots // composers)
    if found.composer_slots < 0:
        fits = f"does not fit {memory:g} GiB, not even without experts of its own"
    else:
        fits = f"{found.composer_slots} of {found.slots} slots fit {memory:g} GiB; shared by {composers}, {share} each"
    lines = [
        (
            "model",
            f"{_count(found.backbone_weights + found.expert_weights)} weights, {_count(found.active_weights)} active",
        ),
        ("a slot", f"{_count(found.slot_weights)} weights: one expert in every layer"),
        (
            "composer",
            f"{_size(found.backbone)} backbone, {_size(found.standins)} stand-ins, "
            f"{_size(found.sketches)} sketches at most, {_size(found.slot)} a slot",
        ),
        ("", fits),
        ("worker", f"{found.worker_slots} of {found.slots} slots fit {memory:g} GiB"),
        ("to join", f"{_size(found.join)} to download"),
        ("a token", f"{found.sketches_per_token:,.0f} bytes of sketches up, {found.rounds_per_token:,.0f} of rounds"),
    ]
    if speed is not None:
        up = (found.sketches_per_token + found.rounds_per_token / 2) * speed
        lines.append(("an hour", f"{_size(3600 * up)} up at {speed:g} tokens/s, {8 * up / 1e6:,.1f} Mbit/s"))
    return lines


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def _size(nbytes: float) -> str:
    for limit, unit in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.3g} {unit}"
    return f"{nbytes:.0f} bytes"
