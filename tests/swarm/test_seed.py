"""A swarm that starts from a dense checkpoint with a tokenizer of its own: upcycled, founded, trained, exported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from harness import START_SECONDS, Swarm, owned_once, run_id_of
from shoal.node.learning.data import load_corpus
from shoal.node.run.kept_manifests import manifest_file
from shoal.node.run.manifest import verify
from shoal.node.seed.store import BACKBONE, SeedStore, bases_from, experts_of, standins_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.timeout(300)

SLOTS, LAYERS, VOCABULARY = 8, 2, 400


def dense_checkpoint(folder: Path) -> None:
    """A random Llama and a tokenizer learned on a part of the text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=0, initializer_range=0.06,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = [document.text.decode(errors="replace") for document in load_corpus("stdlib").train[:20]]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def loss_of(swarm: Swarm, checkpoint: Path) -> dict[str, float]:
    done = swarm.call("evaluate", str(checkpoint), "--windows", "8", "--context-length", "128", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_from_a_dense_checkpoint_to_a_trained_mixture(swarm: Swarm, tmp_path: Path) -> None:
    dense, moe, out = tmp_path / "dense", tmp_path / "moe", tmp_path / "out"
    dense_checkpoint(dense)
    made = swarm.call("upcycle", str(dense), str(moe), "--experts", "8", "--top-k", "2", "--noise", "0.05")
    assert made.returncode == 0, made.stderr
    facts = {
        "data.context_length": 128, "outer.every_steps": 8, "standin.kind": "chosen", "standin.bytes_per_weight": 0.6,
        "standin.flops_fraction": 0.99, "standin.choose_every": 2, "standin.trial_steps": 4, "standin.publish_every": 4,
    }  # fmt: skip
    settings = [part for name, value in facts.items() for part in ("--set", f"{name}={value}")]
    swarm.found("--seed", str(moe), "--min-composers", "2", "--steps", "100000", *settings)
    peers = [swarm.join(f"c{i}", "--data-shard", f"{i}/2") for i in range(2)]
    worker = swarm.join("worker", "--role", "worker")
    everybody = [*peers, worker]
    swarm.wait_for("all own experts", lambda: owned_once(everybody, SLOTS), START_SECONDS)
    swarm.wait_for("both merge", lambda: all(peer.commits() > 1 for peer in peers), START_SECONDS)

    manifest = verify(manifest_file(swarm.folder / "bootstrap", run_id_of(swarm.invite)).read_bytes())
    assert manifest.data.tokenizer == "seed"
    for peer in peers:
        store = SeedStore(peer.folder / "seed", manifest.model.start)
        assert store.part(BACKBONE) is not None
        assert all(store.part(bases_from(SLOTS) + layer) is not None for layer in range(LAYERS))
        assert all(store.part(standins_of(slot)) is not None for slot in range(SLOTS))
        fetched = {slot for slot in range(SLOTS) if store.part(experts_of(slot)) is not None}
        assert set(peer.epochs()) <= fetched < set(range(SLOTS)), "experts are fetched by who owns them"

    # The budget for FLOPs is one that the corrections of what experts have in common cannot keep for all of them.
    swarm.wait_for("all chose", lambda: all(peer.said("standin.form") for peer in everybody), START_SECONDS)
    store = SeedStore(worker.folder / "seed", manifest.model.start)
    assert store.part(bases_from(SLOTS)) is not None
    assert store.part(BACKBONE) is None

    exported = swarm.call("export", swarm.invite, str(out))
    assert exported.returncode == 0, exported.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "mixtral"
    after = loss_of(swarm, out)
    assert after["nats_per_token"] < math.log(VOCABULARY) - 0.5, "the dense model knew nothing"
    assert after["bits_per_byte"] < after["nats_per_token"] / math.log(2), "a token is more than a byte"
