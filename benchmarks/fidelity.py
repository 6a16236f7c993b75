"""How well stand-ins follow a learning expert, and how fast they age: one training run, many publishers watching it.

    ./dev bench fidelity --steps 200
    ./dev bench fidelity --steps 192 --of deltas --optimizer muon

A lone composer trains the preset `bench`, or one of another width. Publishers of several settings see the same rows of
the same experts, so the settings differ in nothing else. Prints a Markdown table: fidelity some steps after a step in
which all published, over the second half of the run, and its mean.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from ..kernels.copies import JUDGED_ROWS, CopyPublisher
from ..kernels.experts import OwnedExpert
from ..kernels.lowbit import LowbitStandIn
from ..kernels.replay import ReplayBuffer
from ..kernels.standin import Publisher, initial_standin, make_publisher
from ..node.learning.composer import Composer
from ..node.learning.data import Batches, load_corpus
from ..node.model.presets import preset
from ..node.run.manifest import Manifest
from .deltas import LEVELS, LowRankPublisher, PartialCopy

SLOTS = (0, 5, 11)  # watched, in every layer
MUON = {"optimizer": "muon", "learning_rate": 0.012, "vector_rate": 8.0}  # docs/evidence/from-nothing.md


@dataclass(frozen=True)
class Setting:
    """One way of publishing."""

    every: int  # steps between deltas; a divisor of the study's cycle
    kind: str = "lowbit"
    width: float = 0.25  # narrow: over the expert's
    rank: int = 8  # of narrow ones' deltas, and of corrections
    refit_steps: int = 8
    refit_learning_rate: float = 3e-3
    share: float = 1.0  # see deltas.py
    levels: int = len(LEVELS)
    exact_every: int = 1  # deltas; others are low-rank corrections


@dataclass(frozen=True)
class Study:
    """Settings that are compared."""

    cycle: int  # steps; every setting publishes at its end
    ages: tuple[int, ...]  # steps into the cycle at which fidelity is measured
    settings: dict[str, Setting]


@dataclass
class Watch:
    """A setting's publishers by (layer, slot), and what was measured by age."""

    setting: Setting
    publishers: dict[tuple[int, int], Publisher]
    measured: dict[int, list[float]]
    delta_bytes: int = 0


_NARROW = Setting(8, kind="narrow")
STUDIES = {
    "stand-ins": Study(
        8,
        (0, 4, 7),
        {
            "4-bit copy, every 8 steps": Setting(8),
            "4-bit copy, every 4 steps": Setting(4),
            "4-bit copy, every 2 steps": Setting(2),
            "narrow f/4, 8 fit steps every 8 steps": _NARROW,
            "the same, rank 16": replace(_NARROW, rank=16),
            "the same, learning rate 0.01": replace(_NARROW, refit_learning_rate=1e-2),
            "the same, f/2": replace(_NARROW, width=0.5),
            "the same, 24 fit steps": replace(_NARROW, refit_steps=24),
            "the same, 4 fit steps every 4 steps": replace(_NARROW, refit_steps=4, every=4),
        },
    ),
    "deltas": Study(
        32,
        (3, 12, 21, 30),  # of cycles of 2, 4, 8 and 16 steps these are at both ends and within
        {f"exact, every {every} steps": Setting(every) for every in (2, 4, 8, 16, 32)}
        | {
            f"the {share:.0%} largest, every {every} steps": Setting(every, share=share)
            for every in (2, 8)
            for share in (0.2, 0.1, 0.05)
        }
        | {f"one level, every {every} steps": Setting(every, levels=1) for every in (2, 8)}
        | {f"rank {rank} every 4 steps, exact every 32": Setting(4, rank=rank, exact_every=8) for rank in (1, 2, 4, 8)},
    ),
}


def publisher_of(setting: Setting, expert: OwnedExpert, act: str, seed: int) -> Publisher:
    """One that begins with what stands in for the expert as it is now."""
    standin = initial_standin(setting.kind, *expert.masters(), round(setting.width * expert.width))
    if isinstance(standin, LowbitStandIn):
        replay = ReplayBuffer(JUDGED_ROWS, standin.hidden)
        if setting.exact_every > 1:
            return LowRankPublisher(standin, replay, act=act, rank=setting.rank, exact_every=setting.exact_every)
        copied = PartialCopy(standin.tensors)
        copied.share, copied.levels = setting.share, setting.levels
        return CopyPublisher(copied, replay, act=act)
    return make_publisher(
        standin,
        rank=setting.rank,
        replay_rows=2048,
        refit_steps=setting.refit_steps,
        refit_learning_rate=setting.refit_learning_rate,
        act=act,
        generator=torch.Generator().manual_seed(seed),
    )


def watch(composer: Composer, setting: Setting, ages: Sequence[int]) -> Watch:
    """Publishers of one setting for the watched experts."""
    publishers = {
        (layer, slot): publisher_of(setting, expert, composer.shape.act, 100 * slot + layer)
        for slot in SLOTS
        for layer, expert in enumerate(composer.model.experts_of(slot))
    }
    return Watch(setting, publishers, {age: [] for age in ages})


class WatchedComposer(Composer):
    """A composer whose rows go to all watches; its own publishers stay unused."""

    watches: Sequence[Watch] = ()

    def observe(self, layer: int, slot: int, x_ND: Tensor, gate_N: Tensor) -> None:
        if slot in SLOTS:
            for each in self.watches:
                each.publishers[layer, slot].observe(x_ND, gate_N)


def train(composer: WatchedComposer, steps: int, cycle: int) -> None:
    """Train, publish and measure."""
    for step in range(1, steps + 1):
        composer.train_step()
        for each in composer.watches:
            for (layer, slot), publisher in each.publishers.items():
                expert = composer.model.experts_of(slot)[layer]
                if step % each.setting.every == 0:
                    publisher.refit(expert)
                    each.delta_bytes += len(publisher.delta(expert))
                if step > steps // 2 and step % cycle in each.measured:
                    each.measured[step % cycle].append(publisher.fidelity(expert))


def lone_composer(optimizer: str, hidden: int) -> WatchedComposer:
    """Of preset `bench`, with another D, an F as large, and heads of 16, where `hidden` says so."""
    chosen = preset("bench")
    sizes = {"hidden_size": hidden, "moe_intermediate_size": hidden, "shared_expert_intermediate_size": hidden}
    heads = {"num_attention_heads": hidden // 16, "num_key_value_heads": hidden // 16}
    config = {**chosen.model.config, **sizes, **heads} if hidden else chosen.model.config
    manifest = Manifest(
        name="bench",
        founder="none",
        created_at=0,
        model=msgspec.structs.replace(chosen.model, config=config),
        data=chosen.data,
        # The schedule of the whole preset: its beginning is where experts move fastest.
        train=msgspec.structs.replace(chosen.train, **(MUON if optimizer == "muon" else {})),
        standin=msgspec.structs.replace(chosen.standin, kind="narrow"),  # so that every step's rows are shown
    )
    text = load_corpus(manifest.data.corpus).shard(0, 4)
    batches = Batches(text, manifest.train.batch_size, manifest.data.context_length, seed=0)
    return WatchedComposer(manifest, owned=range(16), next_batch=batches.next)


def main() -> None:
    """Run all settings of a study side by side and print the table."""
    parser = argparse.ArgumentParser(prog="./dev bench fidelity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--of", choices=STUDIES, default="stand-ins", help="what is compared")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--hidden", type=int, default=0, help="D and F of other experts than the preset's")
    args = parser.parse_args()
    study = STUDIES[args.of]
    if args.steps < 2 * study.cycle:
        parser.error(f"--steps must be at least {2 * study.cycle}")
    if args.hidden % 16:
        parser.error("--hidden must be a multiple of 16")
    torch.set_num_threads(1)
    composer = lone_composer(args.optimizer, args.hidden)
    watches = {name: watch(composer, setting, study.ages) for name, setting in study.settings.items()}
    composer.watches = list(watches.values())
    train(composer, args.steps, study.cycle)
    ages = " | ".join(f"{age} steps into the cycle" if age else "just published" for age in study.ages)
    print(f"| | {ages} | mean | bytes per expert and step |")
    print("|---" * (len(study.ages) + 3) + "|")
    for name, each in watches.items():
        means = [statistics.fmean(values) for values in each.measured.values()]
        columns = " | ".join(f"{mean:.3f}" for mean in (*means, statistics.fmean(means)))
        print(f"| {name} | {columns} | {each.delta_bytes / len(each.publishers) / args.steps:.0f} |")


if __name__ == "__main__":
    main()
