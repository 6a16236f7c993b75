"""The number under an exported checkpoint is the one of the model that was exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shoal.node.errors import ConfigError
from shoal.node.learning.composer import Composer
from shoal.node.learning.data import load_corpus
from shoal.node.learning.evaluate import HELDOUT_SEED, continuation, evaluate_checkpoint, heldout_loss
from shoal.node.learning.tokenizer import byte_tokenizer
from shoal.node.model.export import write_checkpoint
from tiny import CONTEXT, composer_of, manifest_of, train

WINDOWS = 5


@pytest.fixture(scope="module")
def composer() -> Composer:
    composer = composer_of(manifest_of(train={"learning_rate": 1e-2}))
    train(composer, 5)
    composer.model.set_tap(None)
    return composer


@pytest.fixture(scope="module")
def checkpoint(composer: Composer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"

    def expert_of(layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        expert = composer.model.experts_of(slot)[layer]
        return expert.gate_up.detach(), expert.down.detach()

    backbone = {name: parameter.detach() for name, parameter in composer.backbone.items()}
    write_checkpoint(
        out, composer.manifest.model, backbone, expert_of, tokenizer=byte_tokenizer(CONTEXT), card="# tiny\n"
    )
    return out


def test_plain_transformers_measures_the_same_loss(composer: Composer, checkpoint: Path) -> None:
    measured = evaluate_checkpoint(checkpoint, windows=WINDOWS, context_length=CONTEXT)
    windows = load_corpus("stdlib").heldout(WINDOWS, CONTEXT, seed=HELDOUT_SEED)
    assert measured.nats_per_token == pytest.approx(heldout_loss(composer.model, windows), abs=1e-5)
    assert measured.bits_per_byte == pytest.approx(measured.nats_per_token / 0.693147, rel=1e-5)
    assert (measured.windows, measured.context_length) == (WINDOWS, CONTEXT)


def test_uneven_batches_weigh_by_their_windows(composer: Composer) -> None:
    windows = torch.randint(0, 256, (17, CONTEXT))  # one more than a batch
    each = [heldout_loss(composer.model, window.unsqueeze(0)) for window in windows]
    assert heldout_loss(composer.model, windows) == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_it_goes_on_writing(checkpoint: Path) -> None:
    text = continuation(checkpoint, "def ", tokens=6, seed=1)
    assert isinstance(text, str)
    assert text == continuation(checkpoint, "def ", tokens=6, seed=1)
    assert text


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkpoint"):
        evaluate_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "asked",
    [{"windows": 0}, {"windows": -1}, {"context_length": 1}, {"context_length": 0}, {"context_length": 1 << 20}],
)
def test_windows_that_measure_nothing_are_refused(asked: dict[str, int], checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(asked)).replace('_', '-')} "):
        evaluate_checkpoint(checkpoint, **asked)
