"""`shoal upcycle`, as the command line calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

FORM = Group("Form", sort_key=0)
COPIES = Group("Copies", sort_key=1)


def upcycle(
    dense: Path,
    out: Path,
    *,
    experts: Annotated[int, Parameter(group=FORM)] = 8,
    granularity: Annotated[int, Parameter(group=FORM)] = 1,
    top_k: Annotated[int, Parameter(group=FORM)] = 2,
    shared: Annotated[int, Parameter(group=FORM)] = 0,
    gates: Annotated[Literal["normalised", "softmax-first"], Parameter(group=FORM)] = "normalised",
    noise: Annotated[float, Parameter(group=COPIES)] = 0.0,
    reinit: Annotated[float, Parameter(group=COPIES)] = 0.0,
    seed: Annotated[int, Parameter(group=COPIES)] = 0,
) -> int:
    """Make a Mixture-of-Experts checkpoint out of a dense one. Without noise it computes the same.

    Feed-forward layers are cut into shards, and shards are copied; docs/upcycling.md says how. The result is a plain
    Hugging Face checkpoint.

        shoal upcycle ./SmolLM2-135M ./moe --experts 8 --top-k 2
        shoal upcycle model.gguf ./moe --experts 64 --granularity 8 --top-k 8
        shoal upcycle ./Qwen3-0.6B ./moe --experts 24 --granularity 4 --shared 1 --top-k 6

    Parameters
    ----------
    dense:
        Folder with config.json and safetensors, or a GGUF file, of the Llama or Qwen3 family.
    out:
        Folder to write; it must not exist yet.
    experts:
        Routed experts in each layer, of all shards together.
    granularity:
        Shards that each layer is cut into: 1 makes coarse copies.
    top_k:
        Routed experts that a token takes; a multiple of the routed shards.
    shared:
        Shards that every token takes.
    gates:
        Whether the router's weights are normalised after its choice, or come from a softmax before it.
    noise:
        Of copies but the first, relative to their weights.
    reinit:
        Part of these copies' neurons that start anew (drop-upcycling).
    seed:
        Of noise and router.
    """
    from rich.progress import Progress

    from .. import logs
    from .convert import Changes, upcycle
    from .form import Form

    logs.configure()
    form, changes = Form(experts, granularity, top_k, shared, gates), Changes(noise, reinit, seed)
    with Progress(transient=True) as bar:
        task = bar.add_task("experts", total=None)
        config = upcycle(dense, out, form, changes, lambda done, total: bar.update(task, completed=done, total=total))
    print(f"{out}: {config['model_type']}, {form.copies} copies of {form.routed_shards} shards in each layer")
    return 0
