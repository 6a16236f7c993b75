"""Export: a plain Hugging Face checkpoint of the run's model, which transformers loads without us.

Routed experts, private ones too, go back to transformers' own layout, fused per layer: `gate_up_proj (E, 2F, D)`,
`down_proj (E, D, F)`.
They are asked for one at a time and written shard by shard, so memory is bounded by one shard (or one layer's experts,
if those are larger), not by the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from ..run.manifest import ModelSpec
from .families import MoEBlock, moe_blocks, skeleton
from .init import materialise, private_names, split_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ExpertOf = Callable[[int, int], tuple[Tensor, Tensor]]

MAX_SHARD_BYTES = 4 << 30


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    backbone: Mapping[str, Tensor],
    expert_of: ExpertOf,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, the weights in safetensors, and what is given of tokenizer and card.

    Args:
        folder: made if missing; files of these names in it are replaced.
        backbone: every parameter of `MoEModel.backbone`, by its name there.
        expert_of: (layer, slot) -> gate_up (2F, D), down (D, F); layers that have slots are counted.
        card: README.md, in Markdown.
        max_shard_bytes: of one weights file; one file suffices below it.

    Raises:
        ValueError: a tensor is missing, has another shape than the config says or is not finite, or no layer has slots.
            The weights may be written in part by then, but never their index or config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = skeleton(spec.config)
    blocks = moe_blocks(network)
    written: list[dict[str, int]] = []  # per file: tensor name -> bytes
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / _part_name(len(written)), metadata={"format": "pt"})
        written.append({name: value.nbytes for name, value in pending.items()})
        pending.clear()

    for name, value in _tensors(spec, network, blocks, backbone, expert_of):
        if pending and sum(t.nbytes for t in pending.values()) + value.nbytes > max_shard_bytes:
            flush()
        pending[name] = value
    flush()
    _name_parts(folder, written)
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(folder)
    GenerationConfig.from_model_config(network.config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _tensors(
    spec: ModelSpec,
    network: PreTrainedModel,
    blocks: list[MoEBlock],
    backbone: Mapping[str, Tensor],
    expert_of: ExpertOf,
) -> Iterator[tuple[str, Tensor]]:
    """Everything in a checkpoint, one tensor at a time: the backbone, then the experts layer by layer."""
    routed = {f"{block.name}.experts.{part}" for block in blocks for part in ("gate_up_proj", "down_proj")}
    persistent = network.state_dict(keep_vars=True).keys()
    for name, parameter in network.named_parameters():
        if name in routed:
            continue
        if name not in backbone:
            raise ValueError(f"{name} is missing from the backbone")
        yield name, _checked(name, backbone[name], parameter.shape)
    for name, _ in network.named_buffers():
        if name in persistent:
            yield name, _initial_buffer(spec, network, name)
    private, shared = split_blocks(blocks, spec.private_layers)
    for block in private:
        yield from _fused(block, partial(_private_expert, block, backbone), block.name)
    for layer, block in enumerate(shared):
        yield from _fused(block, partial(expert_of, layer), f"layer {layer}")


def _fused(
    block: MoEBlock, expert_of: Callable[[int], tuple[Tensor, Tensor]], where: str
) -> Iterator[tuple[str, Tensor]]:
    gate_up = torch.empty(block.num_experts, 2 * block.width, block.hidden)
    down = torch.empty(block.num_experts, block.hidden, block.width)
    for expert in range(block.num_experts):
        for fused, value in zip((gate_up, down), expert_of(expert), strict=True):
            fused[expert] = _checked(f"expert {expert} of {where}", value, fused.shape[1:])
    yield f"{block.name}.experts.gate_up_proj", gate_up
    yield f"{block.name}.experts.down_proj", down


def _private_expert(block: MoEBlock, backbone: Mapping[str, Tensor], expert: int) -> tuple[Tensor, Tensor]:
    names = private_names(block)[expert]
    for name in names:
        if name not in backbone:
            raise ValueError(f"{name} is missing from the backbone")
    gate_up, down = names
    return backbone[gate_up], backbone[down]


def _checked(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(shape)}")
    value = value.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} is not finite")
    return value


def _initial_buffer(spec: ModelSpec, network: PreTrainedModel, name: str) -> Tensor:
    """A buffer that belongs into the checkpoint but that nothing here trains, such as a router's selection bias."""
    path, _, key = name.rpartition(".")
    materialise(network, spec.seed, only=path)
    buffer: Tensor = network.get_submodule(path).get_buffer(key)
    return buffer


def _part_name(index: int) -> str:
    return f"model-part-{index}.safetensors"


def _name_parts(folder: Path, written: list[dict[str, int]]) -> None:
    """Give the weights files the names that loaders look for, and index them if there are several."""
    index = folder / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    if len(written) == 1:
        (folder / _part_name(0)).replace(folder / "model.safetensors")
        return
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for part, sizes in enumerate(written):
        final = f"model-{part + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / _part_name(part)).replace(folder / final)
        weight_map.update(dict.fromkeys(sizes, final))
    total = sum(size for sizes in written for size in sizes.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
