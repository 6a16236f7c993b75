"""`./dev bench kernels`: what experts and stand-ins cost on this machine.

Three tables. Experts: forward and backward of `apply_experts` with all experts owned, against the experts of
transformers in each way that it has, against a dense SwiGLU of the width that every token activates (K F: the same
FLOPs without routing), against itself with three in four experts replaced by stand-ins, and its FLOP/s against those of
one large matrix product. Stand-ins: the time of
every operation on one of them, and its bytes. Gradient sketches: time, size and error, beside the best that any matrix
of the rank can do, for the gradient of a random expert that should do another's work, on inputs whose k-th direction
has variance 1 / k.

`timing.py` says how it is compared.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.bases import Bases
from ..kernels.experts import DenseExpert, run_expert
from ..kernels.gradient_sketch import GradientSketcher, Projections
from ..kernels.routed import apply_experts
from ..kernels.standin import KINDS, make_publisher, standin_from_bytes
from ..node.capacity import device_to_use
from .layer import FULL, ON_GPU, QUICK, RANK, THEIRS, EmptyTap, ExpertsResult, Shape, bench_experts, first_standin
from .timing import interleaved, medians

SKETCH_RANKS = (4, 16, 64)
SKETCH_ROWS = 1024
TRAINED_STEP = 0.02  # how far weights move between two deltas, over their size: 8 steps of AdamW at 1e-4 for D = 512
CAVEAT = (
    "Medians of interleaved rounds. Ratios are medians of each round's ratio and survive a busy machine; "
    "milliseconds do not: compare them only within one run."
)


@dataclass(frozen=True)
class StandInResult:
    """One kind of stand-in for one expert: median milliseconds by operation, and sizes in bytes."""

    kind: str
    hidden: int
    width: int
    rounds: int
    milliseconds: dict[str, float]
    expert_bytes: int  # of the expert itself, in float32
    state_bytes: int
    snapshot_bytes: int
    delta_bytes: int  # after a step of TRAINED_STEP


@dataclass(frozen=True)
class SketchResult:
    """Gradient sketches of one expert at one rank; errors are of both matrices together, over the gradient's norm."""

    hidden: int
    width: int
    rank: int
    rounds: int
    milliseconds: dict[str, float]  # form: the gradient itself from SKETCH_ROWS rows; add: its sketch; rebuild
    gradient_numel: int
    sketch_numel: int
    error: float  # median over seeds
    best_error: float


def bench_standin(kind: str, shape: Shape, seconds: float, generator: torch.Generator) -> StandInResult:
    """Every operation on one expert's stand-in, on the owner's side and on the side of who holds a copy."""
    expert = DenseExpert(
        torch.randn(2 * shape.width, shape.hidden, generator=generator) * shape.hidden**-0.5,
        torch.randn(shape.hidden, shape.width, generator=generator) * shape.width**-0.5,
    )
    bases = Bases([expert.dense()])
    publisher = make_publisher(first_standin(kind, expert, shape, bases), rank=RANK, generator=generator)
    rows_ND = torch.randn(2048, shape.hidden, generator=generator)
    publisher.observe(rows_ND, torch.rand(len(rows_ND), generator=generator))
    held = standin_from_bytes(publisher.published.to_bytes(), bases=bases)
    delta_sizes: list[int] = []
    delta = b""

    def train() -> None:
        for weight in expert.dense():
            weight += TRAINED_STEP * weight.std() * torch.randn(weight.shape, generator=generator)

    def publish() -> None:
        nonlocal delta
        delta = publisher.delta(expert)
        delta_sizes.append(len(delta))

    times = interleaved(
        {
            "train": train,
            "refit": lambda: publisher.refit(expert),
            "delta": publish,
            "apply": lambda: held.apply(delta),
            "dense": held.dense,
            "fidelity": lambda: publisher.fidelity(expert),
            "initial": lambda: first_standin(kind, expert, shape, bases),
        },
        seconds,
    )
    del times["train"]  # only makes deltas worth sending
    if held.digest() != publisher.published.digest():
        raise RuntimeError(f"the {kind} copy is not what its owner published")
    return StandInResult(
        kind=kind,
        hidden=shape.hidden,
        width=shape.width,
        rounds=len(times["delta"]),
        milliseconds=medians(times),
        expert_bytes=sum(weight.nbytes for weight in expert.dense()),
        state_bytes=held.nbytes,
        snapshot_bytes=len(held.to_bytes()),
        delta_bytes=int(statistics.median(delta_sizes[1:])),
    )


class _KeptRows(EmptyTap):
    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        self.rows = x_ND, dy_ND, a_NF, dh_NH


def bench_sketches(shape: Shape, rank: int, seconds: float, generator: torch.Generator) -> SketchResult:
    """Sketches of one expert's gradient."""

    def weights() -> tuple[Tensor, Tensor]:
        gate_up = torch.randn(2 * shape.width, shape.hidden, generator=generator) * shape.hidden**-0.5
        return gate_up, torch.randn(shape.hidden, shape.width, generator=generator) * shape.width**-0.5

    tap = _KeptRows()
    expert = DenseExpert(*(weight.requires_grad_() for weight in weights()))
    x_ND = torch.randn(SKETCH_ROWS, shape.hidden, generator=generator) * torch.arange(1, shape.hidden + 1) ** -0.5
    all_N1 = torch.zeros(SKETCH_ROWS, 1, dtype=torch.int64)
    wrong_ND = apply_experts(x_ND, all_N1, all_N1 + 1.0, [expert], tap=tap) - run_expert(x_ND, *weights())
    wrong_ND.square().sum().backward()  # type: ignore[no-untyped-call]

    def form() -> tuple[Tensor, Tensor]:
        x_ND, dy_ND, a_NF, dh_NH = tap.rows
        return dh_NH.t() @ x_ND, dy_ND.t() @ a_NF

    sketchers = [GradientSketcher(Projections(shape.hidden, shape.width, rank, seed)) for seed in range(9)]
    for sketcher in sketchers:
        sketcher.add(*tap.rows)
    gradient, rebuilt = form(), [sketcher.projections.rebuild(sketcher.take()) for sketcher in sketchers]
    errors = [math.hypot(*(float((g - w).norm()) for g, w in zip(r, gradient, strict=True))) for r in rebuilt]
    norm = math.hypot(*(float(matrix.norm()) for matrix in gradient))
    times = interleaved(
        {
            "form": form,
            "add": lambda: sketchers[0].add(*tap.rows),
            "rebuild": lambda: sketchers[0].projections.rebuild(sketchers[0].flat()),
        },
        seconds,
    )
    return SketchResult(
        hidden=shape.hidden,
        width=shape.width,
        rank=rank,
        rounds=len(times["add"]),
        milliseconds=medians(times),
        gradient_numel=sum(matrix.numel() for matrix in gradient),
        sketch_numel=sketchers[0].projections.numel,
        error=statistics.median(errors) / norm,
        best_error=math.hypot(*(float(torch.linalg.svdvals(matrix)[rank:].norm()) for matrix in gradient)) / norm,
    )


def markdown(
    experts: Sequence[ExpertsResult], standins: Sequence[StandInResult], sketches: Sequence[SketchResult]
) -> str:
    """All tables and how to read them."""
    lines = [
        "Experts, forward and backward. T x D, E experts of F, top K; ratios to all experts owned (above 1: slower)",
        "",
        "| shape | rounds | owned, ms | FLOP/s of a product's | dense of K F | "
        + " | ".join([*(f"transformers, {way}" for way in THEIRS), *(f"3/4 {kind}" for kind in KINDS)])
        + " |",
        "|---|---|---|---|---|" + "---|" * (len(THEIRS) + len(KINDS)),
    ]
    for result in experts:
        told = (result.ratios.get(name) for name in ("dense", *THEIRS, *KINDS))
        ratios = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in told)
        took = f"{result.milliseconds['owned']:.2f} | {result.of_ceiling:.2f}"
        lines.append(f"| {result.shape} | {result.rounds} | {took} | {ratios} |")
    operations = ("initial", "refit", "delta", "fidelity", "apply", "dense")
    lines += [
        "",
        "One expert's stand-in, ms and bytes (narrow: F/4, deltas of rank 8)",
        "",
        f"| kind | D x F | {' | '.join(operations)} | expert | state | snapshot | delta |",
        "|---|---|" + "---|" * (len(operations) + 4),
    ]
    for standin in standins:
        costs = " | ".join(f"{standin.milliseconds[name]:.3f}" for name in operations)
        sizes = f"{standin.expert_bytes} | {standin.state_bytes} | {standin.snapshot_bytes} | {standin.delta_bytes}"
        lines.append(f"| {standin.kind} | {standin.hidden} x {standin.width} | {costs} | {sizes} |")
    lines += [
        "",
        f"Gradient sketches of one expert, {SKETCH_ROWS} rows, ms; sizes in numbers; errors over the gradient's norm",
        "",
        "| D x F | rank | form the gradient | add | rebuild | gradient | sketch | error | best of the rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for sketch in sketches:
        costs = " | ".join(f"{sketch.milliseconds[name]:.2f}" for name in ("form", "add", "rebuild"))
        sizes = f"{sketch.gradient_numel} | {sketch.sketch_numel} | {sketch.error:.3f} | {sketch.best_error:.3f}"
        lines.append(f"| {sketch.hidden} x {sketch.width} | {sketch.rank} | {costs} | {sizes} |")
    return "\n".join([*lines, "", CAVEAT])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and, if asked, write JSON."""
    parser = argparse.ArgumentParser(prog="./dev bench kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="to spend on each line of the tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cuda: experts only, of larger shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small shape, for a look whether it runs")
    parser.add_argument("--out", type=Path, default=None, help="file for the same numbers as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    device, dtype = device_to_use(arguments.device), getattr(torch, arguments.dtype)
    shapes = QUICK if arguments.quick else ON_GPU if device.type == "cuda" else FULL
    seconds = min(arguments.seconds, 0.5) if arguments.quick else arguments.seconds
    experts = [bench_experts(shape, seconds, device, dtype) for shape in shapes]
    of_one = {(shape.hidden, shape.width): shape for shape in shapes if device.type == "cpu"}  # where they are made
    standins = [bench_standin(kind, shape, seconds, generator) for shape in of_one.values() for kind in KINDS]
    ranks = [(shape, rank) for shape in of_one.values() for rank in SKETCH_RANKS if 4 * rank <= shape.width]
    sketches = [bench_sketches(shape, rank, seconds, generator) for shape, rank in ranks]
    print(markdown(experts, standins, sketches))
    if arguments.out is not None:
        report = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": arguments.threads,
            "device": str(device),
            "dtype": arguments.dtype,
            "seed": arguments.seed,
            "experts": [asdict(result) for result in experts],
            "standins": [asdict(result) for result in standins],
            "sketches": [asdict(result) for result in sketches],
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
