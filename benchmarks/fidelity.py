"""How well stand-ins follow a learning expert, and how fast they age: one training run, many publishers watching it.

    python -m shoal.benchmarks.fidelity --steps 200

A lone composer trains the preset `bench`. Publishers of several settings see the same rows of the same experts, so the
settings differ in nothing else. Prints a Markdown table: mean fidelity right after the common publishing step, and four
and seven steps later, over the second half of the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch
from torch import Tensor

from ..kernels.standin import Publisher, initial_standin, make_publisher
from ..node.learning.composer import Composer
from ..node.learning.data import Batches, load_corpus
from ..node.model.presets import preset
from ..node.run.manifest import Manifest

CYCLE = 8  # steps; every setting publishes at its end
AGES = (0, 4, 7)  # steps into the cycle
SLOTS = (0, 5, 11)  # watched, in every layer


@dataclass(frozen=True)
class Setting:
    """One way of publishing."""

    kind: str = "narrow"
    width: int = 16  # narrow: of 64
    rank: int = 8
    every: int = CYCLE  # steps between deltas; a divisor of CYCLE
    refit_steps: int = 8
    refit_learning_rate: float = 3e-3


@dataclass
class Watch:
    """A setting's publishers by (layer, slot), and what was measured by age."""

    setting: Setting
    publishers: dict[tuple[int, int], Publisher]
    measured: dict[int, list[float]] = field(default_factory=lambda: {age: [] for age in AGES})
    delta_bytes: int = 0


BASE = Setting()
SETTINGS = {
    "4-bit copy, every 8 steps": Setting(kind="lowbit"),
    "4-bit copy, every 4 steps": Setting(kind="lowbit", every=4),
    "4-bit copy, every 2 steps": Setting(kind="lowbit", every=2),
    "narrow f/4, 8 fit steps every 8 steps": BASE,
    "the same, rank 16": replace(BASE, rank=16),
    "the same, learning rate 0.01": replace(BASE, refit_learning_rate=1e-2),
    "the same, f/2": replace(BASE, width=32),
    "the same, 24 fit steps": replace(BASE, refit_steps=24),
    "the same, 4 fit steps every 4 steps": replace(BASE, refit_steps=4, every=4),
}


def watch(composer: Composer, setting: Setting) -> Watch:
    """Publishers of one setting for the watched experts."""
    publishers = {
        (layer, slot): make_publisher(
            initial_standin(setting.kind, *expert.masters(), setting.width),
            rank=setting.rank,
            replay_rows=2048,
            refit_steps=setting.refit_steps,
            refit_learning_rate=setting.refit_learning_rate,
            act=composer.shape.act,
            generator=torch.Generator().manual_seed(100 * slot + layer),
        )
        for slot in SLOTS
        for layer, expert in enumerate(composer.model.experts_of(slot))
    }
    return Watch(setting, publishers)


class WatchedComposer(Composer):
    """A composer whose rows go to all watches; its own publishers stay unused."""

    watches: Sequence[Watch] = ()

    def _observe(self, layer: int, slot: int, x_ND: Tensor, gate_N: Tensor) -> None:
        if slot in SLOTS:
            for each in self.watches:
                each.publishers[layer, slot].observe(x_ND, gate_N)


def train(composer: WatchedComposer, steps: int) -> None:
    """Train, publish and measure."""
    for step in range(1, steps + 1):
        composer.train_step()
        for each in composer.watches:
            for (layer, slot), publisher in each.publishers.items():
                expert = composer.model.experts_of(slot)[layer]
                if step % each.setting.every == 0:
                    publisher.refit(expert)
                    each.delta_bytes += len(publisher.delta(expert))
                if step > steps // 2 and step % CYCLE in AGES:
                    each.measured[step % CYCLE].append(publisher.fidelity(expert))


def main() -> None:
    """Run all settings side by side and print the table."""
    parser = argparse.ArgumentParser(prog="python -m shoal.benchmarks.fidelity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    if steps < 2 * CYCLE:
        parser.error(f"--steps must be at least {2 * CYCLE}")
    torch.set_num_threads(1)
    chosen = preset("bench")
    manifest = Manifest(
        name="bench",
        founder="none",
        created_at=0,
        model=chosen.model,
        data=chosen.data,
        train=chosen.train,  # the schedule of the whole preset: its beginning is where experts move fastest
        standin=msgspec.structs.replace(chosen.standin, kind="narrow"),  # so that every step's rows are shown
    )
    text = load_corpus(manifest.data.corpus).shard(0, 4)
    batches = Batches(text, manifest.train.batch_size, manifest.data.context_length, seed=0)
    composer = WatchedComposer(manifest, owned=range(16), next_batch=batches.next)
    watches = {name: watch(composer, setting) for name, setting in SETTINGS.items()}
    composer.watches = list(watches.values())
    train(composer, steps)
    print("| stand-in | just published | 4 steps into the cycle | 7 steps into the cycle | bytes per expert and step |")
    print("|---|---|---|---|---|")
    for name, each in watches.items():
        means = [f"{sum(values) / len(values):.3f}" for values in each.measured.values()]
        print(f"| {name} | {' | '.join(means)} | {each.delta_bytes / len(each.publishers) / steps:.0f} |")


if __name__ == "__main__":
    main()
