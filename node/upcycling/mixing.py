"""Branch-Train-MiX: models that were trained apart from one seed become one mixture (Sukhbaatar et al. 2024).

Feed-forward layers of the seed and of every branch become experts, the seed's as number 0, a generalist. All else is
averaged: plainly, or by TIES (Yadav et al. 2023), where of each branch's change the largest fifth counts, by majority
of sign. Weights of the k experts that a token takes add up to 1: a mixture of equal branches computes what each does.

The router starts at random, or knows the domains: its rows are then what the router would see of each domain's text,
less what it sees of all (after FlexOlmo, Shi et al. 2025), so that a token goes where text like it was learned. As
there, a negative bias can keep tokens with the generalist that are like no domain. These routers have no biases. But x
has, on average, one and the same part along the mean m of all that the router sees, E[x · m / |m|²] = 1, and a row less
b m / |m|² has the bias -b as well as that holds for single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..learning.data import Batches, load_corpus
from ..model.export import write_checkpoint
from ..model.families import moe_blocks, skeleton
from ..model.local_checkpoint import load_model
from ..run.manifest import ModelSpec
from ..storage.new_folder import new_folder
from .branching import encoder_of
from .convert import ROUTER_STD, moe_config
from .dense import Dense
from .form import Form

Merge = Literal["mean", "ties"]
TIES_KEPT = 0.2  # of each branch's change, the largest part
DOMAIN_WINDOWS, DOMAIN_CONTEXT = 16, 128  # tokens that the router gets to see of a domain
DOMAIN_ROUTER_SCALE = 4.0  # logits of a token that looks just like its domain: it decides, and is not stubborn


class Mixture(Mapping[str, Tensor]):
    """The backbone of the mixture by name, made when asked for; `expert` is one branch's layer.

    Args:
        members: the seed first.

    Raises:
        ConfigError: they are not of one shape.
    """

    def __init__(self, members: Sequence[Dense], top_k: int, merge: Merge, seed: int) -> None:
        self.members, self.merge, self._seed = members, merge, seed
        for member in members[1:]:
            if _shape(member.config) != _shape(members[0].config):
                raise ConfigError(
                    f"{member.path} has another shape than {members[0].path}", fix="mix branches of one seed"
                )
        self.config = moe_config(members[0].config, Form(experts=len(members), granularity=1, top_k=top_k))
        network = skeleton(self.config)
        blocks = moe_blocks(network)
        self._routers = {f"{block.name}.gate.weight": layer for layer, block in enumerate(blocks)}
        experts = {id(p) for block in blocks for p in block.block.get_submodule("experts").parameters()}
        self._shapes = {name: p.shape for name, p in network.named_parameters() if id(p) not in experts}

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._routers:
            generator = torch.Generator().manual_seed((self._seed << 20) + self._routers[name])
            return torch.randn(self._shapes[name], generator=generator) * ROUTER_STD
        if name not in self._shapes:
            raise KeyError(name)
        kept = "model.embed_tokens.weight" if name == "lm_head.weight" and name not in self.members[0] else name
        tensors = [member.tensor(kept) for member in self.members]
        return torch.stack(tensors).mean(0) if self.merge == "mean" else ties(tensors[0], tensors[1:])

    def expert(self, layer: int, member: int) -> tuple[Tensor, Tensor]:
        """gate_up (2F, D), gate rows first, and down (D, F)."""
        gate, up, down = self.members[member].feed_forward(layer)
        return torch.cat((gate, up)), down


def ties(base: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`base` plus the merged changes of `others`: trimmed to the largest, then the mean of those with the sign that has
    more weight behind it."""
    changes = torch.stack([other - base for other in others])
    flat = changes.flatten(1).abs()
    keep = max(1, round(TIES_KEPT * flat.shape[1]))
    least = flat.kthvalue(flat.shape[1] - keep + 1, dim=1).values.view(-1, *[1] * base.dim())
    trimmed = torch.where(changes.abs() >= least, changes, torch.zeros(()))
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    count = agreeing.sum(0).clamp(min=1)
    return base + torch.where(agreeing, trimmed, torch.zeros(())).sum(0) / count


def mix(
    paths: Sequence[Path],
    out: Path,
    *,
    top_k: int,
    merge: Merge,
    seed: int,
    domains: Sequence[Tensor] = (),
    bias: float = 0.0,
) -> dict[str, Any]:
    """Write the mixture as a Hugging Face checkpoint. Returns its config.

    Args:
        paths: of dense checkpoints, the seed first.
        domains: what its routers know to begin with, see `route_by_domains`; without any they are random.

    Raises:
        ConfigError: see `Dense`, `Mixture`, `new_folder`; fewer than two, or not a domain for each branch. `out` is not
            there then.
    """
    if len(paths) < 2:
        raise ConfigError("a mixture takes a seed and a branch at least", fix="name more checkpoints")
    if not 0 <= seed < 1 << 40:
        raise ConfigError(f"--chance {seed} is not possible", fix="give a number from 0 up")
    if domains and len(domains) != len(paths) - 1:
        raise ConfigError(f"{len(domains)} domains for {len(paths) - 1} branches", fix="give a text for each")
    with new_folder(out) as folder, ExitStack() as stack:
        members = [stack.enter_context(Dense(path)) for path in paths]
        mixture = Mixture(members, top_k, merge, seed)
        card = f"# Mixed\n\nExperts by number: {', '.join(path.name for path in paths)}. Everything else by {merge}.\n"
        tokenizer = members[0].tokenizer
        spec = ModelSpec(config=mixture.config)
        write_checkpoint(folder, spec, mixture, mixture.expert, tokenizer=tokenizer, card=card)
        if domains:
            route_by_domains(folder, domains, bias)
        return mixture.config


@torch.no_grad()
def route_by_domains(folder: Path, domains: Sequence[Tensor], bias: float = 0.0) -> None:
    """Give the routers of a mixture rows that know the domains, and write it back.

    Args:
        domains: tokens (N, S) of the text of each branch, in the order of branches. Expert 0, the generalist, has
            zeros: a token that is like no domain goes there first.
        bias: taken off the logits of all other experts; a token that looks just like its domain has a logit of
            `DOMAIN_ROUTER_SCALE`.
    """
    network: PreTrainedModel = load_model(folder)
    blocks = moe_blocks(network)
    seen: dict[int, list[Tensor]] = {}
    for layer, block in enumerate(blocks):
        block.router.register_forward_hook(
            lambda _, inputs, __, layer=layer: seen.setdefault(layer, []).append(inputs[0].flatten(0, -2).mean(0))
        )
    for tokens in domains:
        network(input_ids=tokens, use_cache=False)
    for layer, block in enumerate(blocks):
        means = torch.stack(seen[layer])
        mean = means.mean(0)
        apart = means - mean
        rows = DOMAIN_ROUTER_SCALE * apart / apart.square().sum(1, keepdim=True).clamp(min=1e-12)
        rows -= bias * mean / mean.square().sum().clamp(min=1e-12)
        weight = block.router.get_parameter("weight")
        weight.copy_(torch.cat((torch.zeros_like(rows[:1]), rows)))
    network.save_pretrained(folder)


def domain_tokens(folder: Path, texts: Sequence[str]) -> list[Tensor]:
    """Some windows of each text, as the seed at `folder` knows its tokens."""
    if not texts:
        return []
    encode = encoder_of(folder)
    return [Batches(encode(load_corpus(text).train), DOMAIN_WINDOWS, DOMAIN_CONTEXT, seed=0).next() for text in texts]


def _shape(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which weights there are, and what they compute: the mixture has the seed's."""
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act",
    )  # fmt: skip
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return head, *(config.get(name) for name in names)
