"""The founder's side: a Mixture-of-Experts checkpoint, cut into the parts of a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from ...kernels.standin import initial_standin
from ..errors import ConfigError
from ..manifest import StandInSpec
from ..model.families import about_the_model, moe_blocks, with_weights_only
from .store import write_part


class Checkpoint:
    """A folder of the Hugging Face layout with a Mixture-of-Experts model, held in memory as float32.

    Raises ConfigError if it cannot be read, or cannot be a run's model.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is no checkpoint", fix="name a folder that upcycle or export wrote")
        try:
            self.network = with_weights_only(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
            self.blocks = moe_blocks(self.network)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder} cannot start a run: {error}", fix="take one of a MoE family") from error
        tokenizer = folder / "tokenizer.json"
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
        num_slots, width = self.blocks[0].num_experts, max(1, round(standin.width_fraction * self.blocks[0].width))
        for slot in range(num_slots):
            tensors, standins = {}, []
            for layer, block in enumerate(self.blocks):
                fused = dict(block.block.get_submodule("experts").named_parameters())
                gate_up, down = (fused[name][slot].detach().clone() for name in ("gate_up_proj", "down_proj"))
                tensors[f"{layer}.gate_up"], tensors[f"{layer}.down"] = gate_up, down
                standins.append(initial_standin(standin.kind, gate_up, down, width).to_bytes())
            digests += [write_part(folder, save(tensors)), write_part(folder, msgspec.msgpack.encode(standins))]
            progress(slot + 1, num_slots)
        return write_part(folder, msgspec.msgpack.encode(digests)).hex()
