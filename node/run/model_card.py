"""The README.md of an exported model: what it is, which run made it, and who took part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from ...protocol.directory.records import PeerRecord
from ..model.init import backbone_shapes, expert_shape, experts_per_token
from .manifest import Manifest


def model_card(manifest: Manifest, run_id: str, rounds: Sequence[int], peers: Mapping[str, PeerRecord]) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        rounds: by fragment of the backbone, the outer round that made it; -1 without one.
        peers: by peer id, who was there at the export. What a peer says of itself is not checked.
    """
    trainers = {peer: record for peer, record in peers.items() if record.role in ("composer", "worker")}
    composers = [record for record in trainers.values() if record.role == "composer"]
    tokens = sum(record.tokens for record in composers)
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(manifest, run_id, rounds, composers, tokens))
    lines = "\n".join(_line(peer, record) for peer, record in sorted(trainers.items()))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- shoal
---

# {manifest.name}

A Mixture-of-Experts language model, trained by a Shoal swarm: every peer held the backbone and a part of the experts,
or experts alone, and learned from its own text or from others' sketches.

| | |
|---|---|
{facts}

## Peers

Those that were in the run when this was exported. Tokens, steps and loss are what each of them says; peers that had
left are in the weights and not in this list.

| peer | role | software | steps | tokens | loss, nats per token | slots |
|---|---|---|---|---|---|---|
{lines}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

`shoal evaluate FOLDER` measures its loss on held-out text.
"""


def _facts(
    manifest: Manifest, run_id: str, rounds: Sequence[int], composers: Sequence[PeerRecord], tokens: int
) -> list[tuple[str, str]]:
    model, data, train, outer = manifest.model, manifest.data, manifest.train, manifest.outer
    every = (
        f"{outer.every_steps}" if outer.growth == 1 else f"{outer.every_steps} to {outer.every_steps * outer.growth:g}"
    )
    shape, sketch, standin = expert_shape(model), manifest.sketch, manifest.standin
    backbone = sum(math.prod(size) for size in backbone_shapes(model).values())
    slot = 3 * shape.hidden * shape.width * shape.num_layers
    top_k = experts_per_token(model)
    whole, active = (f"{(backbone + number * slot) / 1e6:,.1f}M" for number in (shape.num_experts, top_k))
    started = datetime.fromtimestamp(manifest.created_at, UTC).date().isoformat()
    merged = ", ".join("none" if number < 0 else str(number) for number in rounds)
    steps = max((record.step for record in composers), default=0)
    return [
        ("run", f"`{run_id}`, since {started}"),
        ("founder", f"`{manifest.founder}`"),
        ("family", f"{model.config.get('model_type')}, {shape.num_experts} experts in a layer, {top_k} to a token"),
        ("weights", f"{whole}, {active} to a token"),
        ("tokens", f"{tokens:,} by {len(composers)} composer{'' if len(composers) == 1 else 's'}"),
        ("steps", f"{steps:,} of {train.steps:,} planned"),
        ("last outer rounds", f"{merged} (by fragment of the backbone)"),
        ("text", f"what each composer named, else {_plain(data.corpus)}"),
        ("tokens of", f"{data.tokenizer}, {data.context_length} in a window"),
        ("optimizer", f"{train.optimizer}, {train.batch_size} sequences a step"),
        ("learning rate", f"{train.learning_rate:g}, experts' {train.learning_rate * train.expert_rate:g}"),
        ("backbone", f"merged every {every} steps, {outer.merge}, {outer.codec}"),
        ("experts of others", f"stand-ins ({standin.kind}), published every {standin.publish_every} steps"),
        ("sketches", "none" if sketch.kind == "none" else f"{sketch.kind} of others' tokens, to owners of experts"),
    ]


def _line(peer: str, record: PeerRecord) -> str:
    loss = f"{record.loss:.3f}" if record.loss else ""
    return (
        f"| `{peer}` | {record.role} | {record.version} | {record.step:,} | {record.tokens:,} | {loss} "
        f"| {len(record.slots)} |"
    )


def _plain(text: str) -> str:
    """For a cell of a table: a founder may write anything."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())
