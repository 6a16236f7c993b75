"""`./dev bench island`: the forms of an island side by side: speed, bytes moved inside, memory, and held-out loss.

Each way trains one composer that owns every expert, alone in its run, on as many tokens as the others, in processes of
its own: one thread each. Ways take turns, `--rounds` times. On a machine that others use too, the CPU's seconds say
more than the clock's. Bytes are what all processes of the island write, by the kernel's count (`/proc/PID/io`): to each
other, for nothing else is written. Memory is the largest resident set of each process in the steps that are measured,
libraries included; what these take alone is said below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..node.island.leader import Island
from ..node.island.learners import Learners
from ..node.island.merging import DataParallel
from ..node.island.pipeline import Pipeline
from ..node.learning.composer import Composer
from ..node.learning.data import Batches, load_corpus
from ..node.learning.evaluate import HELDOUT_SEED, heldout_loss
from ..node.model.init import expert_shape
from ..node.model.presets import preset
from ..node.model.stages import spans
from ..node.run.manifest import Manifest, with_settings

MOST_WARM_UP = 8  # steps, a whole block of them
EVALUATED = 64  # windows


@dataclass(frozen=True)
class Measured:
    """One way, once."""

    way: str
    processes: int
    tokens_per_second: float
    cpu_seconds_per_token: float  # of all processes
    bytes_per_token: float  # moved inside the island
    library_bytes: int  # resident before there is a model
    leader_bytes: int  # resident at most
    member_bytes: int  # the same of the largest member; 0 without any
    loss: float  # held out, nats per byte


def ways(manifest: Manifest, size: int, every: int) -> dict[str, Callable[[], Island | None]]:
    """What is compared, by name."""
    devices = ["cpu"] * size
    return {
        "one process": lambda: None,
        f"data parallel, {size}": lambda: DataParallel(size, devices, 1),
        f"learners, {size}, every {every}": lambda: Learners(size, devices, 1, every=every),
        f"pipeline, {size}": lambda: Pipeline(size, devices, 1, spans=spans(manifest.model, size)),
    }


class Processes:
    """The island's, by id: what the kernel knows of them."""

    def __init__(self, composer: Composer) -> None:
        island = composer.island
        self._ids = [os.getpid(), *(member.process.pid for member in (island.members if island else []))]

    def forget_peaks(self) -> None:
        """The largest resident set counts from now on."""
        for process in self._ids:
            Path(f"/proc/{process}/clear_refs").write_text("5")

    def peaks(self) -> list[int]:
        """Bytes, the leader's first."""
        return [_status(process, "VmHWM") for process in self._ids]

    def cpu_seconds(self) -> float:
        """That they ever computed."""
        times = [psutil.Process(process).cpu_times() for process in self._ids]
        return float(sum(time.user + time.system for time in times))

    def written(self) -> int:
        """Bytes that they ever wrote, to whatever."""
        lines = [line for process in self._ids for line in Path(f"/proc/{process}/io").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def _status(process: int, name: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(way: str, manifest: Manifest, island: Island | None, tokens: int) -> Measured:
    """Train on so many tokens, in this process and members of it."""
    torch.set_num_threads(1)
    libraries = _status(os.getpid(), "VmRSS")
    corpus, train, context = load_corpus(manifest.data.corpus), manifest.train, manifest.data.context_length
    batches = Batches(corpus.shard(0, 1), train.batch_size, context, seed=0)
    heldout: Tensor = corpus.heldout(EVALUATED, context, seed=HELDOUT_SEED)
    slots = expert_shape(manifest.model).num_experts
    at_once = train.batch_size * context * (island.size if island and island.form != "pipeline" else 1)
    manifest = with_settings(manifest, [f"train.steps={max(1, tokens // at_once)}"])
    composer = Composer(manifest, owned=range(slots), next_batch=batches.next)
    composer.island = island
    try:
        while composer.step < min(MOST_WARM_UP, composer.train.steps // 4):
            composer.train_step()
        processes = Processes(composer)
        processes.forget_peaks()
        written, computed, before = processes.written(), processes.cpu_seconds(), composer.tokens
        began = time.perf_counter()
        while composer.has_work():
            report = composer.train_step()
            if island is not None and report.processes < island.size:
                raise RuntimeError(f"{way}: the island broke")
        seconds, learned = time.perf_counter() - began, composer.tokens - before
        leader, *members = processes.peaks()
        moved, computed = processes.written() - written, processes.cpu_seconds() - computed
    finally:
        if island is not None:
            island.close()
    return Measured(
        way, 1 + len(members), learned / seconds, computed / learned, moved / learned if members else 0.0, libraries,
        leader, max(members, default=0), heldout_loss(composer.model, heldout),
    )  # fmt: skip


def markdown(measured: list[Measured]) -> str:
    """One line a way: medians of its rounds, and of each round's ratio to the first way."""
    names = list(dict.fromkeys(m.way for m in measured))
    of = {name: [m for m in measured if m.way == name] for name in names}
    lines = [
        "| | tokens/s | ratio | CPU ms a token | bytes moved a token | leader, MiB | largest member, MiB "
        "| nats per byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        runs = of[name]
        pairs = zip(runs, of[names[0]], strict=False)
        ratios = [run.tokens_per_second / base.tokens_per_second for run, base in pairs]
        leader, member = (
            statistics.median(getattr(run, field) for run in runs) / (1 << 20)
            for field in ("leader_bytes", "member_bytes")
        )
        lines.append(
            f"| {name} | {statistics.median(run.tokens_per_second for run in runs):,.0f} "
            f"| {statistics.median(ratios):.2f} "
            f"| {1e3 * statistics.median(run.cpu_seconds_per_token for run in runs):.2f} "
            f"| {statistics.median(run.bytes_per_token for run in runs):,.0f} "
            f"| {leader:,.0f} | {f'{member:,.0f}' if member else ''} "
            f"| {statistics.median(run.loss for run in runs):.4f} |"
        )
    library = statistics.median(m.library_bytes for m in measured) / (1 << 20)
    return "\n".join([*lines, "", f"Libraries alone take {library:,.0f} MiB of each process."])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="./dev bench island", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--size", type=int, default=2, help="processes")
    parser.add_argument("--every", type=int, default=8, help="steps between two merges of learners")
    parser.add_argument("--steps", type=int, default=48, help="of one process; others take the same tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--way", default=None, help="only this one, once, as JSON")
    arguments = parser.parse_args()
    chosen = preset(arguments.preset)
    manifest = with_settings(Manifest(name="bench", founder="none", created_at=0, **vars(chosen)), arguments.set)
    tokens = arguments.steps * manifest.train.batch_size * manifest.data.context_length
    compared = ways(manifest, arguments.size, arguments.every)
    if arguments.way is not None:
        print(json.dumps(asdict(measure(arguments.way, manifest, compared[arguments.way](), tokens))))
        return
    command = [sys.executable, "-m", "shoal.benchmarks.island", *sys.argv[1:], "--way"]
    measured = []
    for number in range(arguments.rounds):
        for way in compared:
            done = subprocess.run([*command, way], stdout=subprocess.PIPE, check=True, text=True)
            measured.append(Measured(**json.loads(done.stdout.splitlines()[-1])))
            found = measured[-1]
            print(f"round {number + 1}, {way}: {found.tokens_per_second:,.0f} tokens/s", file=sys.stderr, flush=True)
    print(f"CPU, one thread a process, preset {arguments.preset}, {tokens:,} tokens each, rounds: {arguments.rounds}\n")
    print(markdown(measured))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(one) for one in measured], indent=1))


if __name__ == "__main__":
    main()
