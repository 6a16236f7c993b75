"""From a dense checkpoint and a form to a Mixture-of-Experts checkpoint of a transformers family, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.export import write_checkpoint
from ..model.families import moe_blocks, skeleton
from ..run.manifest import ModelSpec
from ..storage.new_folder import new_folder
from .dense import Dense
from .form import Form

ROUTER_STD = 0.02
# Of the logits where a softmax comes first. Smaller would preserve more, and make the probabilities of different copies
# equal in float32, so that a token takes shards of two copies: at 1e-4 that happens to one token in a thousand.
TINY_LOGITS_STD = 1e-4
# What both of dense and MoE have, under one name.
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What makes copies differ from copy 0, which stays the dense layer.

    Attributes:
        noise: standard deviation of what is added to their weights, over that of the matrix.
        reinit: part of their neurons that start anew, from a normal distribution of the matrix's mean and deviation
            (drop-upcycling). Without either, copies are equal and only the router tells them apart.
        seed: of both, and of the router.
    """

    noise: float = 0.0
    reinit: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 10 or not 0 <= self.reinit <= 1:
            raise ConfigError("--noise is from 0 to 10 and --reinit from 0 to 1", fix="give such numbers")
        if not 0 <= self.seed < 1 << 20:
            raise ConfigError(f"--seed {self.seed} is not possible", fix="give a number from 0 to a million")


def moe_config(dense: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """The config of a family whose blocks can hold what the dense one computes, exactly.

    Raises ConfigError if there is none.
    """
    width = form.neurons(0, int(dense["intermediate_size"])).stop
    config = {key: dense[key] for key in _KEPT if dense.get(key) is not None}
    if config.pop("attention_bias", False):
        raise ConfigError("its attention has biases, which no family here has", fix="take a checkpoint without")
    if dense.get("mlp_bias"):
        raise ConfigError("its feed-forward layers have biases, and experts have none", fix="take a checkpoint without")
    if "sliding_attention" in (dense.get("layer_types") or ()):
        raise ConfigError("some of its layers see a window only, and here all see all", fix="take a checkpoint without")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.setdefault(token, None)
    head = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    qwen, softmax_first = dense["model_type"] == "qwen3", form.gates == "softmax-first"
    routed = {"num_experts_per_tok": form.top_k, "moe_intermediate_size": width, "norm_topk_prob": not softmax_first}
    if form.shared and not softmax_first:
        rope = {**config.get("rope_parameters", {}), "partial_rotary_factor": 1.0}
        return {
            **config, **routed, "model_type": "glm4_moe", "n_routed_experts": form.experts, "use_qk_norm": qwen,
            "n_shared_experts": form.shared, "first_k_dense_replace": 0, "rope_parameters": rope,
            "num_nextn_predict_layers": 0, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        }  # fmt: skip
    if form.shared and not qwen:
        if head * config["num_attention_heads"] != config["hidden_size"]:
            raise ConfigError("its heads are wider than Qwen2-MoE's can be", fix="give --gates normalised")
        return {
            **config, **routed, "model_type": "qwen2_moe", "num_experts": form.experts, "qkv_bias": False,
            "shared_expert_intermediate_size": form.shared * width,
        }  # fmt: skip
    if qwen and not form.shared:
        return {**config, **routed, "model_type": "qwen3_moe", "num_experts": form.experts}
    if not softmax_first:
        config |= {"num_local_experts": form.experts, "num_experts_per_tok": form.top_k, "intermediate_size": width}
        return {**config, "model_type": "mixtral", "sliding_window": None}
    raise ConfigError(
        "no family has these gates with and without a shared expert for both Llama and Qwen3",
        fix="softmax first goes with --shared 1 or more for a Llama, with none for a Qwen3",
    )


class Upcycled(Mapping[str, Tensor]):
    """The backbone of the MoE by name, made when asked for; `expert` makes one expert.

    Memory is that of one dense layer, besides what is asked for.
    """

    def __init__(self, dense: Dense, form: Form, changes: Changes) -> None:
        self.dense, self.form, self.changes = dense, form, changes
        self.config = moe_config(dense.config, form)
        network = skeleton(self.config)
        blocks = moe_blocks(network)
        self._routers = {
            f"{block.name}.{name}.weight": layer
            for layer, block in enumerate(blocks)
            for name, module in block.block.named_children()
            if module is block.router
        }
        experts = {id(p) for block in blocks for p in block.block.get_submodule("experts").parameters()}
        parameters = {name: p for name, p in network.named_parameters() if id(p) not in experts}
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._selection_biases = {name for name, p in parameters.items() if not p.requires_grad}
        self._layer = lru_cache(maxsize=1)(dense.feed_forward)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._routers:
            return self._router(self._routers[name])
        if name in self._selection_biases:
            return torch.zeros(self._shapes[name])
        if ".shared_expert_gate." in name:
            return torch.zeros(self._shapes[name])  # its sigmoid is 1/2
        if ".shared_expert" in name:
            return self._shared(int(name.split(".")[2]), name.split(".")[-2])
        if name == "lm_head.weight" and name not in self.dense:
            return self.dense.tensor("model.embed_tokens.weight")
        if name not in self._shapes:
            raise KeyError(name)
        return self.dense.tensor(name)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up (2F/G, D), gate rows first, and down (D, F/G)."""
        root = self.form.scale**0.5
        gate, up, down = self._shard(layer, self.form.shard_of(expert))
        if self.form.copy_of(expert):
            gate, up, down = self._changed(layer, expert, (gate, up, down))
        return torch.cat((gate, up * root)), down * root

    def _shard(self, layer: int, shard: int) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = self._layer(layer)
        neurons = self.form.neurons(shard, self.dense.width)
        return gate[neurons], up[neurons], down[:, neurons]

    def _shared(self, layer: int, part: str) -> Tensor:
        shards = [self._shard(layer, shard) for shard in range(self.form.shared)]
        gate, up, down = (
            torch.cat(parts, dim) for parts, dim in zip(zip(*shards, strict=True), (0, 0, 1), strict=True)
        )
        halved = self.config["model_type"] == "qwen2_moe"  # by its gate
        return {"gate_proj": gate, "up_proj": up, "down_proj": down * (2 if halved else 1)}[part]

    def _router(self, layer: int) -> Tensor:
        """One row a copy, repeated over its shards."""
        hidden = int(self.config["hidden_size"])
        std = ROUTER_STD if self.form.gates == "normalised" else TINY_LOGITS_STD / hidden**0.5
        rows = torch.randn(self.form.copies, hidden, generator=self._generator(layer, -1)) * std
        return rows.repeat_interleave(self.form.routed_shards, dim=0)

    def _changed(self, layer: int, expert: int, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        generator, changes = self._generator(layer, expert), self.changes
        width = parts[0].shape[0]
        fresh = torch.randperm(width, generator=generator)[: round(changes.reinit * width)]
        made = []
        for part, neurons in zip(parts, (0, 0, 1), strict=True):
            std, mean = part.std(), part.mean()
            new = part.clone()
            if changes.noise:
                new += torch.randn(part.shape, generator=generator) * (changes.noise * std)
            if len(fresh):
                drawn = torch.randn(part.shape, generator=generator) * std + mean
                new.index_copy_(neurons, fresh, drawn.index_select(neurons, fresh))
            made.append(new)
        gate, up, down = made
        return gate, up, down

    def _generator(self, layer: int, expert: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.changes.seed << 40) + (layer << 20) + expert + 1)


def upcycle(
    path: Path, out: Path, form: Form, changes: Changes, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the MoE made of the dense checkpoint at `path` as a Hugging Face checkpoint. Returns its config.

    Args:
        progress: told experts written, and how many there are.

    Raises:
        ConfigError: see `Dense`, `moe_config`, `new_folder`; `out` is not there then.
    """
    with new_folder(out) as folder, Dense(path) as dense:
        made = Upcycled(dense, form, changes)
        total, done = dense.num_layers * form.experts, 0

        def expert_of(layer: int, slot: int) -> tuple[Tensor, Tensor]:
            nonlocal done
            done += 1
            progress(done, total)
            return made.expert(layer, slot)

        card = f"# Upcycled from {path.name}\n\n{form}\n\n{changes}\n"
        write_checkpoint(folder, ModelSpec(config=made.config), made, expert_of, tokenizer=dense.tokenizer, card=card)
    return made.config
