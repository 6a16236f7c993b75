"""`./dev bench wire`: what turning tensors into bytes for others costs, and back.

Speeds are of the float32 numbers that the bytes stand for. Making bytes includes quantising; reading them includes
every check of what a peer may have sent, and ends with float32 numbers, or with a stand-in's next state. Beside each,
the same numbers copied in memory, in the same rounds (`timing.py`).

The last column is the share of one core that all such bytes of an inner step take, made and read, for a composer with
an eighth of the experts among others like it. Its step takes `--step-ms`, or as long as `./dev bench step` finds here.
Formats of whole experts travel when owners change, not with steps.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..kernels.codecs import tensor_bytes
from ..kernels.copies import CopyStandIn
from ..kernels.formats import FORMATS, decode_expert, encode_expert
from ..kernels.rows import RowCodec
from ..kernels.sign_sketch import SignSketch
from ..kernels.sketch import RowBuffer, RowSketch
from ..kernels.standin import initial_standin
from ..node.model.init import backbone_shapes, expert_shape
from ..node.run.manifest import Manifest, with_settings
from ..protocol.averaging.parts import PART_BYTES, CodecName, PartCodec
from .step import OWNED_PART, measure, of_preset
from .timing import interleaved, medians

MAX_ROWS = 1 << 20


@dataclass(frozen=True)
class Work:
    """One kind of bytes.

    Attributes:
        numbers: float32 ones that `make` and `read` work through.
        nbytes: made of them.
        made_a_step, read_a_step: numbers for an inner step, on average.
    """

    name: str
    numbers: int
    nbytes: int
    make: Callable[[], object]
    read: Callable[[], object]
    made_a_step: float = 0.0
    read_a_step: float = 0.0


@dataclass(frozen=True)
class Measured:
    """GB of float32 numbers a second, and the share of a core in training."""

    name: str
    bytes_per_number: float
    made: float
    read: float
    copied: float
    share: float | None


def backbone_parts(manifest: Manifest) -> list[Work]:
    """Pseudo-gradients, in parts as they are sent."""
    backbone = sum(math.prod(shape) for shape in backbone_shapes(manifest.model).values())
    works = []
    for name in get_args(CodecName):
        codec = PartCodec(name)
        part = torch.randn(min(backbone, int(PART_BYTES / codec.encoded_bytes(1 << 16) * (1 << 16))))
        message = codec.encode(part)
        used = backbone / manifest.outer.mean_every if name == manifest.outer.codec else 0.0
        works.append(
            Work(
                f"backbone, {name}",
                part.numel(),
                len(message.buffer),
                partial(codec.encode, part),
                partial(codec.decode, message, part.numel()),
                # One's own contribution is sent and one's share of the average; those of others are read, and the rest.
                2 * used,
                2 * used,
            )
        )
    return works


def sketch_rows(manifest: Manifest) -> list[Work]:
    """Rows of one expert's sketch, in as many as a step routes to it."""
    shape, train = expert_shape(manifest.model), manifest.train
    top_k = int(manifest.model.config["num_experts_per_tok"])
    pairs = train.batch_size * manifest.data.context_length * top_k
    rows = max(1, pairs // shape.num_experts)
    x_ND, dy_ND = torch.randn(2, rows, shape.hidden).unbind()
    works = []
    for codec in get_args(RowCodec):
        make = partial(_sketch, codec, x_ND, dy_ND)
        data = make()
        others = pairs * shape.num_layers * (1 - 1 / OWNED_PART)
        used = 2 * shape.hidden * others if manifest.sketch.kind == "rows" and codec == manifest.sketch.codec else 0.0
        read = partial(_rows, data, shape.hidden)
        works.append(Work(f"row sketches, {codec}", 2 * rows * shape.hidden, len(data), make, read, used, used))
    return works


def _sketch(codec: RowCodec, x_ND: Tensor, dy_ND: Tensor) -> bytes:
    buffer = RowBuffer(x_ND.shape[1], codec)
    buffer.add(x_ND, dy_ND)
    return buffer.take(None).to_bytes()


def _rows(data: bytes, hidden: int) -> tuple[Tensor, Tensor]:
    sketch = RowSketch.from_bytes(data, hidden=hidden, max_rows=MAX_ROWS)
    return sketch.x.dense(), sketch.dy.dense()


def sign_sketches(manifest: Manifest) -> list[Work]:
    """Of one expert. Those of an interval are made once, and read in every step that takes a share of them."""
    shape, spec = expert_shape(manifest.model), manifest.sketch
    numbers = 3 * shape.hidden * shape.width
    others = numbers * shape.num_layers * shape.num_experts * (1 - 1 / OWNED_PART) if spec.kind == "signs" else 0.0
    d_gate_up, d_down = torch.randn(2 * shape.width, shape.hidden), torch.randn(shape.hidden, shape.width)
    make, read = partial(_signs, d_gate_up, d_down), partial(_gradient, shape.hidden, shape.width)
    data = make()
    return [Work("sign sketches", numbers, len(data), make, partial(read, data), others / spec.interval, others)]


def _signs(d_gate_up: Tensor, d_down: Tensor) -> bytes:
    return SignSketch.of(d_gate_up, d_down, pairs=1).to_bytes()


def _gradient(hidden: int, width: int, data: bytes) -> tuple[Tensor, Tensor]:
    return SignSketch.from_bytes(data, hidden=hidden, width=width).dense()


def standin_deltas(manifest: Manifest) -> list[Work]:
    """Deltas of copies, after as many steps of AdamW at the run's learning rate as lie between two of them."""
    shape, spec, train = expert_shape(manifest.model), manifest.standin, manifest.train
    numbers = 3 * shape.hidden * shape.width
    everything = numbers * shape.num_layers * shape.num_experts / spec.publish_every
    before = torch.randn(2 * shape.width, shape.hidden) * 0.02, torch.randn(shape.hidden, shape.width) * 0.02
    moved = train.learning_rate * train.expert_rate * spec.publish_every
    after = [weights + moved * torch.randn_like(weights).clamp(-1, 1) for weights in before]
    works = []
    for kind in ("lowbit", "ternary"):
        standin = initial_standin(kind, *before, 0)
        assert isinstance(standin, CopyStandIn)
        delta = _delta(standin, *after)
        part = 1 / OWNED_PART if kind == spec.kind else 0.0
        works.append(
            Work(
                f"stand-ins' deltas, {kind}",
                numbers,
                len(delta),
                partial(_delta, standin, *after),
                partial(_apply, standin, delta),
                part * everything,
                (1 - part) * everything if part else 0.0,
            )
        )
    return works


def _delta(standin: CopyStandIn, gate_up: Tensor, down: Tensor) -> bytes:
    return copy(standin).delta(standin.payload_to(gate_up, down))


def _apply(standin: CopyStandIn, delta: bytes) -> None:
    copy(standin).apply(delta)


def whole_experts(manifest: Manifest) -> list[Work]:
    """Experts as newcomers and standbys get them."""
    shape = expert_shape(manifest.model)
    gate_up, down = torch.randn(2 * shape.width, shape.hidden) * 0.02, torch.randn(shape.hidden, shape.width) * 0.02
    works = []
    for fmt in FORMATS:
        data = encode_expert(gate_up, down, fmt)
        works.append(
            Work(
                f"whole experts, {fmt}",
                gate_up.numel() + down.numel(),
                len(data),
                partial(encode_expert, gate_up, down, fmt),
                partial(decode_expert, data, shape.hidden, shape.width),
            )
        )
    return works


def run(manifest: Manifest, seconds: float, step_seconds: float) -> list[Measured]:
    """Measure everything, each for about `seconds`."""
    found = []
    for kinds in (backbone_parts, sketch_rows, sign_sketches, standin_deltas, whole_experts):
        for work in kinds(manifest):
            copied = partial(tensor_bytes, torch.randn(work.numbers))
            times = medians(interleaved({"made": work.make, "read": work.read, "copied": copied}, seconds))
            speed = {name: 4 * work.numbers / (1e6 * taken) for name, taken in times.items()}
            busy = 4e-9 * (work.made_a_step / speed["made"] + work.read_a_step / speed["read"])
            share = busy / step_seconds if work.made_a_step else None
            found.append(Measured(work.name, work.nbytes / work.numbers, **speed, share=share))
    return found


def markdown(found: list[Measured]) -> str:
    """One line a kind."""
    lines = ["| | bytes a number | made, GB/s | read, GB/s | copied, GB/s | of one core |", "|---|---|---|---|---|---|"]
    for one in found:
        speeds = f"{one.made:.2f} | {one.read:.2f} | {one.copied:.2f}"
        share = "" if one.share is None else f"{one.share:.1%}"
        lines.append(f"| {one.name} | {one.bytes_per_number:.3f} | {speeds} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="./dev bench wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each kind of bytes")
    parser.add_argument("--step-ms", type=float, default=None, help="of a composer's inner step")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifest = with_settings(of_preset(arguments.preset), arguments.set)
    step = arguments.step_ms and arguments.step_ms / 1e3
    if step is None:
        step = sum(spent for name, spent in measure(manifest, torch.device("cpu"), 3).items() if name != "plain")
    found = run(manifest, arguments.seconds, step)
    print(f"1 thread, preset {arguments.preset}, {1e3 * step:.0f} ms a step\n\n{markdown(found)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
