"""`./dev bench step`: a composer's step beside plain training of the same model with transformers, on one device.

The composer owns an eighth of the experts, runs 4-bit stand-ins for the rest, collects row sketches for their owners,
and publishes its own stand-ins as often as the preset says; nobody else is there, so nothing is sent or waited for. The
plain loop holds the whole model: forward with transformers' own experts, backward, AdamW. Both take the same batches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..node.capacity import device_to_use
from ..node.learning.composer import Composer
from ..node.model.init import expert_shape
from ..node.model.presets import preset
from ..node.run.manifest import Manifest, with_settings
from ..node.sketches.sketching import SketchCollector

OWNED_PART = 8  # a composer's share of the experts is one in so many
WARM_UP = 3


class Clock:
    """Seconds by part, with the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def plain(manifest: Manifest, device: torch.device) -> Callable[[Tensor, Clock], None]:
    """One step of ordinary training."""
    values = dict(manifest.model.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Tensor, clock: Clock) -> None:
        with clock.part("plain"):
            loss = model(input_ids=batch.to(device), labels=batch.to(device), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def composed(manifest: Manifest, device: torch.device, batches: list[Tensor]) -> Callable[[Tensor, Clock], None]:
    """One step of a composer, with what it does for others."""
    shape = expert_shape(manifest.model)
    owned = range(max(1, shape.num_experts // OWNED_PART))
    composer = Composer(manifest, owned=owned, next_batch=lambda: batches[-1], device=device)
    composer.collector = collector = SketchCollector(manifest.sketch, composer.shape, seed=0)
    others = {slot: 1.0 for slot in range(shape.num_experts) if slot not in composer.owned}

    def step(batch: Tensor, clock: Clock) -> None:
        batches[:] = [batch]
        with clock.part("forward, backward, rows of sketches"):
            composer.compute()
        with clock.part("sketches: choose, pack"):
            collector.take(others)
        with clock.part("optimizer"):
            composer.apply()
        if composer.step % manifest.standin.publish_every == 0:
            with clock.part("publishing stand-ins"):
                composer.publish()

    return step


def of_preset(name: str) -> Manifest:
    """A run of it. ValueError if there is none."""
    return Manifest(name="bench", founder="none", created_at=0, **vars(preset(name)))


def measure(manifest: Manifest, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds a step, by part; `plain` is the whole of the other loop."""
    generator = torch.Generator().manual_seed(0)
    size = manifest.train.batch_size, manifest.data.context_length
    vocabulary = int(manifest.model.config["vocab_size"])
    ways = [plain(manifest, device), composed(manifest, device, [])]
    clock = Clock(device)
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            clock.seconds.clear()
        batch = torch.randint(0, vocabulary, size, generator=generator)
        for way in ways:
            way(batch, clock)
    return {name: seconds / steps for name, seconds in clock.seconds.items()}


def markdown(seconds: dict[str, float], tokens: int) -> str:
    """The table, and the ratio."""
    whole = seconds["plain"]
    ours = {name: value for name, value in seconds.items() if name != "plain"}
    total = sum(ours.values())
    lines = ["| | ms a step | tokens/s | of the composer's step |", "|---|---|---|---|"]
    lines.append(f"| plain transformers, whole model | {1e3 * whole:.1f} | {tokens / whole:,.0f} | |")
    lines.append(f"| composer, an eighth of the experts | {1e3 * total:.1f} | {tokens / total:,.0f} | 100% |")
    lines += [f"| {name} | {1e3 * value:.1f} | | {value / total:.0%} |" for name, value in ours.items()]
    lines += ["", f"A composer is {whole / total:.2f} times as fast as plain training of the whole model."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="./dev bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = device_to_use(arguments.device)
    settings = ["train.optimizer=adamw", *arguments.set]  # as in the plain loop
    manifest = with_settings(of_preset(arguments.preset), settings)
    seconds = measure(manifest, device, arguments.steps)
    tokens = manifest.train.batch_size * manifest.data.context_length
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, preset {arguments.preset}, {tokens:,} tokens a step, {arguments.steps} steps\n")
    print(markdown(seconds, tokens))
    if arguments.json is not None:
        told = {"device": where, "preset": arguments.preset, "tokens": tokens, "seconds": seconds}
        arguments.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
