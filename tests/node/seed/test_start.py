"""A model out of a seed's parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save
from shoal.node.model.build import build_model
from shoal.node.seed.start import FromSeed
from shoal.node.seed.store import BACKBONE, SeedStore, experts_of, standins_of, write_part
from tiny import LAYERS, SLOTS, composer_of


class CountingStore(SeedStore):
    """Counts how often a part is read."""

    def __init__(self, folder: Path, start: str) -> None:
        super().__init__(folder, start)
        self.read: Counter[int] = Counter()

    def need(self, number: int) -> bytes:
        self.read[number] += 1
        return super().need(number)


def test_a_model_is_what_its_parts_say_and_each_is_read_once(tmp_path: Path) -> None:
    composer = composer_of()
    with torch.no_grad():
        for parameter in composer.model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    digests = [write_part(tmp_path, b""), write_part(tmp_path, save(dict(composer.backbone)))]
    form = composer.menu.forms[0]
    for slot in range(SLOTS):
        experts = [expert.masters() for expert in composer.experts_of(slot)]
        named = {}
        for layer, (gate_up, down) in enumerate(experts):
            named |= {f"{layer}.gate_up": gate_up, f"{layer}.down": down}
        standins = [composer.menu.make(form, *pair).to_bytes() for pair in experts]
        digests += [write_part(tmp_path, save(named)), write_part(tmp_path, msgspec.msgpack.encode(standins))]
    store = CountingStore(tmp_path, write_part(tmp_path, msgspec.msgpack.encode(digests)).hex())
    manifest = composer.manifest
    model = build_model(manifest.model, owned=[1], standin=manifest.standin, start=FromSeed(manifest.model, store))
    assert store.read == Counter([BACKBONE, experts_of(1), *(standins_of(slot) for slot in range(SLOTS) if slot != 1)])
    assert all(torch.equal(model.backbone[name], value) for name, value in composer.backbone.items())
    for layer in range(LAYERS):
        for mine, theirs in zip(
            model.experts_of(1)[layer].masters(), composer.experts_of(1)[layer].masters(), strict=True
        ):
            assert torch.equal(mine, theirs)
        for slot in (0, 2, 3):
            made = composer.menu.make(form, *composer.experts_of(slot)[layer].masters())
            assert model.shards[layer].standin(slot).digest() == made.digest()
