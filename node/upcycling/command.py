"""`shoal upcycle`, `shoal branch` and `shoal mix`, as the command line calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from ..errors import ConfigError

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


def branch(
    checkpoint: Path,
    out: Path,
    *,
    data: str = "stdlib",
    steps: int = 1000,
    batch_size: int = 8,
    context_length: int = 256,
    learning_rate: float = 1e-3,
    only: Literal["all", "router"] = "all",
    device: str = "auto",
    seed: int = 0,
) -> int:
    """Train a checkpoint on one kind of text, on this machine alone: a branch for `mix`.

    With `--only router` it tunes a mixture's routers, and nothing else.

        shoal branch ./seed ./code --data ~/code --steps 2000
        shoal branch ./mixture ./tuned --only router --data ~/all --steps 200

    Parameters
    ----------
    checkpoint:
        Folder of a Hugging Face model, dense or a mixture.
    out:
        Folder to write; it must not exist yet.
    data:
        A file, a folder, or `stdlib` for the sources of Python's own library. Its held-out part is left out.
    steps:
        Of AdamW, with warm-up and a cosine down to a tenth of the rate.
    batch_size:
        Windows in a step.
    context_length:
        Tokens in a window.
    learning_rate:
        At its highest.
    only:
        What to train.
    device:
        `cpu`, `cuda`; `auto` takes a GPU if there is one.
    seed:
        Of the windows that are drawn.
    """
    from rich.progress import Progress

    from .. import logs
    from ..capacity import device_to_use
    from .branching import train

    logs.configure()
    with Progress(transient=True) as bar:
        task = bar.add_task("steps", total=steps)
        loss = train(
            checkpoint,
            out,
            data,
            steps=steps,
            batch_size=batch_size,
            context_length=context_length,
            learning_rate=learning_rate,
            only=only,
            device=device_to_use(device),
            seed=seed,
            report=lambda step, loss: bar.update(task, completed=step, description=f"loss {loss:.3f}"),
        )
    print(f"{out}: {steps} steps, last loss {loss:.4f} nats a token")
    return 0


def mix(
    out: Path,
    seed: Path,
    *branches: Path,
    top_k: int = 2,
    merge: Literal["mean", "ties"] = "mean",
    domain: Annotated[tuple[str, ...], Parameter(metavar="TEXT...", negative=(), show_default=False)] = (),
    generalist: float = 0.0,
    chance: int = 0,
) -> int:
    """Make one mixture out of a dense seed and branches of it that were trained apart (Branch-Train-MiX).

    Their feed-forward layers become experts, the seed's stays as a generalist, all else is averaged. Tune the router
    after that, by `shoal branch --only router`, or train all of it in a swarm: `shoal found --seed OUT`.

        shoal mix ./mixture ./seed ./code ./prose ./tables
        shoal mix ./mixture ./seed ./code ./prose --domain ~/code --domain ~/prose

    Parameters
    ----------
    out:
        Folder to write; it must not exist yet.
    seed:
        The checkpoint that all branches began with.
    branches:
        Checkpoints that it became, each by training on another kind of text; one at least.
    top_k:
        Experts that a token takes.
    merge:
        Of what is no expert: the mean, or TIES.
    domain:
        A text for each branch, in their order: the router begins with what it sees of them, instead of at random.
    generalist:
        With domains: by how much a token prefers the seed's expert to one whose domain it is not like, as a logit. A
        token that is just like its domain has 4 for that.
    chance:
        Seed of a random router.
    """
    from .. import logs
    from .mixing import domain_tokens, mix

    logs.configure()
    if generalist and not domain:
        raise ConfigError("--generalist says how a token's domain is chosen, and there are none", fix="give --domain")
    domains = domain_tokens(seed, domain)
    config = mix([seed, *branches], out, top_k=top_k, merge=merge, seed=chance, domains=domains, bias=generalist)
    print(f"{out}: {config['model_type']} of {len(branches) + 1} experts, {top_k} to a token")
    return 0
