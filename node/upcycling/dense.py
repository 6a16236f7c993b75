"""A dense checkpoint, one tensor at a time: a folder of safetensors as it lies on disk, or a GGUF file in memory."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..model.local_checkpoint import load_config, reading

_FAMILIES = ("llama", "qwen3")


class Dense:
    """An open checkpoint; close it, or use it in a `with` block.

    Args:
        path: a folder with config.json and safetensors, or a .gguf file. GGUF weights are unpacked to float32 and held
            in memory, all of them.

    Raises:
        ConfigError: it is neither, cannot be read, or is of a family that cannot be upcycled.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}  # by tensor name: an open file, or a dict
        if path.is_file() and path.suffix == ".gguf":
            self.config, self.tokenizer = self._open_gguf(path)
        elif (path / "config.json").is_file():
            self.config, self.tokenizer = self._open_folder(path)
        else:
            raise ConfigError(f"{path} is no checkpoint", fix="name a folder with config.json, or a .gguf file")
        if self.config["model_type"] not in _FAMILIES:
            raise ConfigError(
                f"{path} is of the family {self.config['model_type']}", fix=f"take one of {' or '.join(_FAMILIES)}"
            )

    def __enter__(self) -> Dense:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """F of a feed-forward layer."""
        return int(self.config["intermediate_size"])

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> Tensor:
        """float32, by its name in transformers. Raises ConfigError if it is not there."""
        if name not in self._where:
            raise ConfigError(f"{self.path} lacks {name}", fix="download it again, whole")
        source = self._where[name]
        value: Tensor = source[name] if isinstance(source, dict) else source.get_tensor(name)
        return value.float()

    def feed_forward(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate (F, D), up (F, D), down (D, F)."""
        names = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        gate, up, down = (self.tensor(name) for name in names)
        return gate, up, down

    def _open_folder(self, path: Path) -> tuple[dict[str, Any], PreTrainedTokenizerBase | None]:
        index = path / "model.safetensors.index.json"
        with reading(path):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
            for name in names or ["model.safetensors"]:
                file = self._stack.enter_context(safe_open(path / name, framework="pt"))
                self._where |= dict.fromkeys(file.keys(), file)
            config = load_config(path).to_dict()
            has_tokenizer = (path / "tokenizer.json").exists()
            return config, AutoTokenizer.from_pretrained(path, local_files_only=True) if has_tokenizer else None

    def _open_gguf(self, path: Path) -> tuple[dict[str, Any], PreTrainedTokenizerBase]:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except ImportError as error:
            raise ConfigError(f"{path} cannot be read: {error}", fix="pip install gguf") from error
        except Exception as error:  # of a file that is cut off, its reader reads on, and fails in many ways
            raise ConfigError(f"{path} cannot be read: {error!r}", fix="download it again, whole") from error
        weights = model.state_dict()
        self._where = dict.fromkeys(weights, weights)
        return model.config.to_dict(), tokenizer
