"""Checkpoints on this machine, read by transformers: nothing is asked of a hub, and what is wrong is said in one line.

For transformers, a folder that is not there is the name of a repository to download.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ConfigError


def require_checkpoint(folder: Path, *, fix: str = "name a folder with config.json and safetensors") -> None:
    """Raises ConfigError, with that `fix`, where there is no folder with a config.json."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no checkpoint", fix=fix)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What cannot be read in the block becomes a ConfigError that names `path`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        files = [path, *(path.iterdir() if path.is_dir() and os.access(path, os.R_OK) else ())]
        if shut := [file for file in files if os.access(file, os.F_OK) and not os.access(file, os.R_OK)]:
            # safetensors calls such a file one that is not there
            raise ConfigError(f"{shut[0]} may not be read", fix="make it readable to this user: chmod a+r") from error
        first, *_ = str(error).strip().splitlines() or [repr(error)]
        raise ConfigError(f"{path} cannot be read: {first}", fix="download it again, whole") from error


def require_positions(folder: Path, config: Any, context_length: int) -> None:
    """Raises ConfigError for a model that is not made for texts of so many tokens."""
    positions = getattr(config, "max_position_embeddings", None) or context_length
    if positions < context_length:
        raise ConfigError(
            f"{folder} has {positions} positions, fewer than --context-length {context_length}",
            fix=f"give --context-length {positions} at most",
        )


def load_config(folder: Path) -> Any:
    """A checkpoint's config. Raises ConfigError."""
    require_checkpoint(folder)
    with reading(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path) -> Any:
    """A checkpoint's model, in float32. Raises ConfigError."""
    require_checkpoint(folder)
    with reading(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
