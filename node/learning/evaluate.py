"""Held-out loss of an exported checkpoint, by plain transformers: no code of ours between weights and number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from .data import VOCAB_SIZE, Encode, load_corpus, tokens_of

if TYPE_CHECKING:
    from ..model.build import MoEModel

HELDOUT_SEED = 0
BATCH_WINDOWS = 16


@dataclass(frozen=True)
class Evaluation:
    """Mean next-token loss over held-out windows."""

    nats_per_token: float
    windows: int
    context_length: int
    bytes_per_token: float = 1.0  # of the held-out text

    @property
    def bits_per_byte(self) -> float:
        """The same in a unit that does not depend on the tokenizer."""
        return self.nats_per_token / self.bytes_per_token / math.log(2)


@torch.no_grad()
def mean_loss(logits_of: torch.nn.Module, windows_NS: Tensor) -> float:
    """Nats per predicted token of a transformers causal model over (N, S) int64 windows; S - 1 predictions each."""
    total = 0.0
    for batch in torch.split(windows_NS, BATCH_WINDOWS):
        logits = logits_of(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum"
        ).item()
    return total / (windows_NS.shape[0] * (windows_NS.shape[1] - 1))


@torch.no_grad()
def heldout_loss(model: MoEModel, windows_NS: Tensor) -> float:
    """Nats per token of one of our models over (N, S) windows, weighted like `mean_loss`."""
    losses = [model.loss(batch).lm.item() * len(batch) for batch in torch.split(windows_NS, BATCH_WINDOWS)]
    return float(sum(losses) / len(windows_NS))


def evaluate_checkpoint(
    checkpoint: Path, *, data: str = "stdlib", windows: int = 64, context_length: int = 256
) -> Evaluation:
    """Load a checkpoint folder with transformers and measure it on the corpus's held-out part.

    Raises:
        ConfigError: the folder is not a checkpoint, or has no tokenizer though its tokens are not bytes; no window,
            none in which a token has one before it, or longer ones than the model is made for.
        DataError: see `load_corpus`.
    """
    from ..model.local_checkpoint import load_config, load_model, require_checkpoint, require_positions

    if windows < 1:
        raise ConfigError(f"--windows {windows} measure nothing", fix="give 1 or more")
    if context_length < 2:
        raise ConfigError(f"--context-length {context_length} leaves no token to predict", fix="give 2 or more")

    require_checkpoint(checkpoint, fix="write one with `shoal export`")
    require_positions(checkpoint, load_config(checkpoint), context_length)
    corpus, bytes_per_token = load_corpus(data), 1.0
    model = load_model(checkpoint).eval()
    encode: Encode = tokens_of
    if model.config.vocab_size != VOCAB_SIZE:
        encode = _own_tokens(checkpoint, model.config.eos_token_id)
        text = sum(len(document.text) for document in corpus.heldout_documents)
        bytes_per_token = text / len(encode(corpus.heldout_documents))
    heldout = corpus.heldout(windows, context_length, HELDOUT_SEED, encode)
    return Evaluation(mean_loss(model, heldout), windows, context_length, bytes_per_token)


def _own_tokens(checkpoint: Path, end: int | None) -> Encode:
    from .tokenizer import Encoder

    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{checkpoint} has no tokenizer.json", fix="put its tokenizer beside it")
    return Encoder(path.read_bytes(), end)


def continuation(checkpoint: Path, prompt: str, *, tokens: int = 120, seed: int = 0) -> str:
    """What the model writes after `prompt`, sampled; by plain transformers, the way a user of the checkpoint would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=20)
    text: str = tokenizer.decode(out[0][inputs["input_ids"].shape[1] :])
    return text
