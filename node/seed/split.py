"""The founder's side: a Mixture-of-Experts checkpoint, cut into the parts of a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save
from torch import Tensor

from ...kernels.bases import Bases, common_bases
from ..errors import ConfigError
from ..model.families import MoEBlock, about_the_model, moe_blocks, with_weights_only
from ..model.local_checkpoint import load_model, require_checkpoint
from ..run.manifest import StandInSpec
from ..standins.standin_menu import menu_of
from .store import write_part

# Experts are variants of one another if they differ by no more than so much of their norm. Those of strangers differ by
# 1.4 of it, copies with 5% of noise by 0.07.
NEAR = 0.5


class Checkpoint:
    """A folder of the Hugging Face layout with a Mixture-of-Experts model, held in memory as float32.

    Raises ConfigError if it cannot be read, or cannot be a run's model.
    """

    def __init__(self, folder: Path) -> None:
        require_checkpoint(folder, fix="name a folder that upcycle or export wrote")
        self.network = with_weights_only(load_model(folder))
        try:
            self.blocks = moe_blocks(self.network)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{folder} cannot start a run: {error}",
                fix="take one of a MoE family; `shoal upcycle` makes one of a dense checkpoint",
            ) from error
        tokenizer = folder / "tokenizer.json"
        self.most_bases = 0  # of a layer, in what `split` wrote
        self.tokenizer = tokenizer.read_bytes() if tokenizer.is_file() and self.vocabulary > 256 else b""

    @property
    def vocabulary(self) -> int:
        return int(self.network.config.vocab_size)

    def config(self) -> dict[str, Any]:
        """For the manifest."""
        return about_the_model(self.network.config.to_dict())

    def split(self, folder: Path, standin: StandInSpec, progress: Callable[[int, int], None]) -> str:
        """Write all parts into `folder`. Returns the digest for `ModelSpec.start`.

        Args:
            standin: of the run: first stand-ins are parts too.
            progress: told slots done, and how many there are.
        """
        experts = {id(p) for block in self.blocks for p in block.block.get_submodule("experts").parameters()}
        backbone = {name: p.detach() for name, p in self.network.named_parameters() if id(p) not in experts}
        digests = [write_part(folder, self.tokenizer), write_part(folder, save(backbone))]
        num_slots = self.blocks[0].num_experts
        bases = self._bases(standin)
        try:
            menu = menu_of(standin, self.blocks[0].hidden, self.blocks[0].width, Bases.from_bytes(*bases))
        except ValueError as error:
            fix = "raise standin.bytes_per_weight or standin.flops_fraction"
            raise ConfigError(f"stand-ins cannot be chosen: {error}", fix=fix) from error
        for slot in range(num_slots):
            tensors, standins = {}, []
            for layer, block in enumerate(self.blocks):
                gate_up, down = _expert(block, slot)
                tensors[f"{layer}.gate_up"], tensors[f"{layer}.down"] = gate_up, down
                standins.append(menu.make(menu.forms[0], gate_up, down).to_bytes())
            digests += [write_part(folder, save(tensors)), write_part(folder, msgspec.msgpack.encode(standins))]
            progress(slot + 1, num_slots)
        digests += [write_part(folder, part) for part in bases]
        self.most_bases = max((len(Bases.from_bytes(part)) for part in bases), default=0)
        return write_part(folder, msgspec.msgpack.encode(digests)).hex()

    def _bases(self, standin: StandInSpec) -> list[bytes]:
        """By layer what its experts have in common, as parts; none where that is not enough, or no use."""
        if standin.kind not in ("shared", "chosen"):
            return []
        parts = []
        for block in self.blocks:
            found = common_bases((_expert(block, slot) for slot in range(block.num_experts)), NEAR)
            if 2 * len(found) > block.num_experts:
                if standin.kind == "chosen":
                    return []
                raise ConfigError(
                    "this checkpoint's experts are not variants of a few, so their stand-ins can share nothing",
                    fix="take one that upcycle made, or set standin.kind to lowbit",
                )
            parts.append(Bases(found).to_bytes())
        return parts


def _expert(block: MoEBlock, slot: int) -> tuple[Tensor, Tensor]:
    fused = dict(block.block.get_submodule("experts").named_parameters())
    return fused["gate_up_proj"][slot].detach().clone(), fused["down_proj"][slot].detach().clone()
