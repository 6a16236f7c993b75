"""Training a dense model on one machine, on one kind of text: a branch for `mix`, or its seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..learning.data import VOCAB_SIZE, Batches, Encode, load_corpus, tokens_of
from ..learning.optimizer import decays
from ..learning.tokenizer import Encoder
from ..model.families import moe_blocks
from ..model.local_checkpoint import load_config, load_model, require_positions
from ..storage.new_folder import new_folder

WARM_UP = 0.05  # of the steps
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def encoder_of(folder: Path) -> Encode:
    """Documents to tokens as a checkpoint's model knows them: its tokenizer's, or bytes where its vocabulary is that.

    Raises ConfigError if it cannot be read, or there is no tokenizer and bytes are not its tokens.
    """
    config = load_config(folder)
    path = folder / "tokenizer.json"
    if config.vocab_size == VOCAB_SIZE:
        return tokens_of
    if not path.is_file():
        raise ConfigError(f"{folder} has no tokenizer.json", fix="put its tokenizer beside it")
    return Encoder(path.read_bytes(), config.eos_token_id)


def train(
    folder: Path,
    out: Path,
    data: str,
    *,
    steps: int,
    batch_size: int,
    context_length: int,
    learning_rate: float,
    device: torch.device,
    seed: int,
    only: Literal["all", "router"] = "all",
    report: Callable[[int, float], None],
) -> float:
    """Train a checkpoint with AdamW, warm-up and cosine, and write it to `out`. Returns the last loss.

    Args:
        data: see `load_corpus`.
        only: the routers of a mixture, or all.
        report: told step and loss.

    Raises:
        ConfigError: see `new_folder`; `folder` cannot be read, there are no routers to tune, a number is none to train
            with, the model has fewer positions than `context_length`, or training diverged. `out` is not there then.
    """
    _check(steps, batch_size, context_length, learning_rate, seed)
    with new_folder(out) as made:
        require_positions(folder, load_config(folder), context_length)
        batches = Batches(encoder_of(folder)(load_corpus(data).train), batch_size, context_length, seed=seed)
        model = _to_train(folder, only).to(device)
        loss = _fit(model, batches, steps, learning_rate, report)
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise ConfigError("training diverged: weights are not finite", fix="give a smaller --learning-rate")
        model.to("cpu").save_pretrained(made)
        for name in TOKENIZER_FILES:
            if (folder / name).exists():
                (made / name).write_bytes((folder / name).read_bytes())
    return loss


def _check(steps: int, batch_size: int, context_length: int, learning_rate: float, seed: int) -> None:
    """Raises ConfigError."""
    for name, value, least in (
        ("steps", steps, 1),
        ("batch-size", batch_size, 1),
        ("context-length", context_length, 2),
    ):
        if value < least:
            raise ConfigError(f"--{name} {value} is not possible", fix=f"give {least} or more")
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"--learning-rate {learning_rate:g} is not possible", fix="give a number above 0")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed {seed} is not possible", fix="give a number from 0 up")


def _to_train(folder: Path, only: Literal["all", "router"]) -> PreTrainedModel:
    model = load_model(folder)
    if only == "router":
        try:
            routers = [block.router for block in moe_blocks(model)]
        except ValueError as error:
            raise ConfigError(f"{folder} has no routers: {error}", fix="leave --only out") from error
        model.requires_grad_(False)
        for router in routers:
            router.requires_grad_(True)
    return model


def _fit(
    model: PreTrainedModel, batches: Batches, steps: int, learning_rate: float, report: Callable[[int, float], None]
) -> float:
    """The last loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if decays(parameter)]},
        {"params": [parameter for parameter in trained if not decays(parameter)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, round(WARM_UP * steps))
    loss = math.nan
    for step in range(steps):
        progress = step / max(1, steps)
        rate = learning_rate * min(1.0, (step + 1) / warm) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = batches.next().to(model.device)
        value = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = value.item()
        report(step + 1, loss)
    return loss
