"""Which island a peer's settings make."""

from __future__ import annotations

import pytest
import tiny
import torch
from shoal.node.config import PeerConfig
from shoal.node.errors import ConfigError
from shoal.node.island.forms import island_of
from shoal.node.island.learners import Learners
from shoal.node.island.merging import DataParallel
from shoal.node.island.pipeline import Pipeline

CPU = torch.device("cpu")


def test_settings_choose_the_form() -> None:
    manifest = tiny.manifest_of()
    data = island_of(PeerConfig(device="cpu", island=4, threads=9), manifest)
    assert type(data) is DataParallel
    assert (data.size, data.threads) == (4, 2)
    learners = island_of(PeerConfig(device="cpu", island=2, island_every=8), manifest)
    assert type(learners) is Learners
    assert learners.patience == 8, "members answer once in a block"
    assert type(island_of(PeerConfig(device="cpu", island=2, island_form="pipeline"), manifest)) is Pipeline


def test_a_model_that_makes_no_such_stages_is_said_at_the_start() -> None:
    with pytest.raises(ConfigError, match=f"{tiny.LAYERS} layers, of which {tiny.LAYERS} have slots"):
        island_of(PeerConfig(device="cpu", island=tiny.LAYERS + 1, island_form="pipeline"), tiny.manifest_of())
