"""Founding: the manifest of a new run, from a preset and what the founder wants otherwise."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ...protocol.experts.handles import key_digest
from ...protocol.identity import Identity
from ..config import PeerConfig
from ..errors import ConfigError
from ..learning.data import VOCAB_SIZE
from ..learning.text_files import DataError
from ..model.families import about_the_model
from ..model.init import built_expert_shape, has_selection_biases
from ..model.presets import preset
from ..sketches.sketch_choice import within_budget
from ..slots.handle_key import found_key
from ..storage.presence import make_data_dir
from .kept_manifests import founded_before
from .manifest import Manifest, ModelSpec, OwnershipSpec, PrivacySpec, TrainSpec, with_settings
from .manifest_checks import check
from .manifest_errors import ManifestError

if TYPE_CHECKING:
    from ..seed.split import Checkpoint

# Renewals come every quarter of a lease, and a record may not live longer than the DHT lets it.
MIN_LEASE_SECONDS, LEASE_SECONDS, MAX_LEASE_SECONDS = 2.0, 20.0, 300.0


def new_manifest(
    config: PeerConfig,
    preset_name: str,
    *,
    name: str | None = None,
    steps: int | None = None,
    min_composers: int = 1,
    lease_seconds: float = LEASE_SECONDS,
    private_layers: int = 0,
    sketch_budget: int | None = None,
    settings: Sequence[str] = (),
    model: Path | None = None,
    seed: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Manifest:
    """A run to be founded by the peer of `config`, whose identity and handle key are made if need be.

    If it has founded one of that name before, that one, with what is asked for otherwise; `model` and `seed` are not
    looked at then, and may be gone.

    Args:
        sketch_budget: bytes that a composer may send for sketches in one step; None leaves that to `settings`.
        settings: see `with_settings`; they win over everything else.
        model: config.json of what to train instead of the preset's model, or a folder with one.
        seed: folder of the MoE checkpoint that the run starts from; its parts are written into the data directory.
        progress: told slots of it that are done, and how many there are.

    Raises ConfigError or ManifestError for what is not possible.
    """
    model, seed = (path and path.expanduser() for path in (model, seed))
    name = name or preset_name
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
        raise ConfigError(f"name = {name!r} is not possible", fix="use up to 32 of a-z, 0-9 and -, not - first")
    if model is not None and seed is not None:
        raise ConfigError("both --model and --seed name a model", fix="leave one of both out")
    parts = preset(preset_name)
    train = _training(parts.train, steps, min_composers, of_preset=model is None and seed is None)
    make_data_dir(config.data_dir)
    founder = Identity.load_or_create(config.identity_path).peer_id
    if (before := founded_before(config.data_dir, founder, name)) is not None:
        return _asked_again(before.manifest, steps, min_composers, lease_seconds, private_layers, settings)
    manifest = Manifest(
        name=name,
        founder=founder,
        created_at=int(time.time()),
        model=msgspec.structs.replace(
            parts.model,
            config=parts.model.config if model is None else _config_in(model),
            private_layers=private_layers,
        ),
        data=parts.data,
        train=train,
        outer=parts.outer,
        standin=parts.standin,
        sketch=parts.sketch,
        ownership=OwnershipSpec(lease_seconds=lease_seconds),
        privacy=PrivacySpec(handle_key_digest=key_digest(found_key(config.handle_key_path)).hex()),
    )
    if settings:
        manifest = with_settings(manifest, settings)
    if seed is None:
        _check_positions(manifest.model.config, manifest, model or preset_name)
    _check_lease(manifest)
    checkpoint = None
    if seed is not None:
        checkpoint = _checkpoint_for(manifest, seed)
        manifest = _of_checkpoint(manifest, checkpoint, seed)
    _check_model(manifest)
    if sketch_budget is not None:
        try:
            manifest = within_budget(manifest, sketch_budget)
        except ValueError as error:
            raise ConfigError(f"the sketch budget is too small: {error}", fix="give --sketch-budget more") from None
        # What was said in so many words holds.
        manifest = with_settings(manifest, [setting for setting in settings if setting.startswith("sketch.")])
    if checkpoint is not None:
        start = checkpoint.split(config.data_dir / "seed", manifest.standin, progress)
        begun = msgspec.structs.replace(manifest.model, start=start, bases=checkpoint.most_bases)
        manifest = msgspec.structs.replace(manifest, model=begun)
    stated = msgspec.structs.replace(manifest.model, experts=built_expert_shape(manifest.model))
    manifest = msgspec.structs.replace(manifest, model=stated)
    try:
        check(manifest)
    except ManifestError as error:  # the founder's own, who has asked for it
        raise ConfigError(error.cause, fix=error.fix) from error
    return manifest


def _asked_again(
    founded: Manifest,
    steps: int | None,
    min_composers: int,
    lease_seconds: float,
    private_layers: int,
    settings: Sequence[str],
) -> Manifest:
    """A run of before, with those facts otherwise that are not what they are if nothing is said."""
    composers = founded.train.min_composers if min_composers == 1 else min_composers
    lease = founded.ownership.lease_seconds if lease_seconds == LEASE_SECONDS else lease_seconds
    layers = private_layers or founded.model.private_layers
    asked = msgspec.structs.replace(
        founded,
        train=_training(founded.train, steps, composers, of_preset=True),
        ownership=msgspec.structs.replace(founded.ownership, lease_seconds=lease),
        model=msgspec.structs.replace(founded.model, private_layers=layers),
    )
    return with_settings(asked, settings) if settings else asked


def _training(train: TrainSpec, steps: int | None, min_composers: int, *, of_preset: bool) -> TrainSpec:
    """The preset's, for so many steps and composers.

    `of_preset` trains its own model from nothing: Muon's learning rate is one for that only.
    """
    if train.optimizer == "muon" and not of_preset:
        train = msgspec.structs.replace(train, optimizer="adamw", learning_rate=TrainSpec().learning_rate)
    if steps is not None:
        if steps < 1:
            raise ConfigError(f"steps = {steps} is not possible", fix="give a number of at least 1")
        train = msgspec.structs.replace(train, steps=steps, warmup_steps=min(train.warmup_steps, steps // 10))
    if min_composers < 1:
        raise ConfigError(f"min_composers = {min_composers} is not possible", fix="give a number of at least 1")
    return msgspec.structs.replace(train, min_composers=min_composers)


def _check_lease(manifest: Manifest) -> None:
    """Raises ConfigError for leases that are too short or too long."""
    lease_seconds = manifest.ownership.lease_seconds
    if not MIN_LEASE_SECONDS <= lease_seconds <= MAX_LEASE_SECONDS:
        raise ConfigError(
            f"lease_seconds = {lease_seconds:g} is not possible",
            fix=f"give seconds from {MIN_LEASE_SECONDS:g} to {MAX_LEASE_SECONDS:g}",
        )


def _check_model(manifest: Manifest) -> None:
    """Raises ConfigError for private layers or a bias rate that this model cannot have."""
    if manifest.model.private_layers:
        try:
            built_expert_shape(manifest.model)
        except ValueError as error:
            raise ConfigError(str(error), fix="give fewer --private-layers, from 0 up") from None
    if manifest.train.bias_rate and not has_selection_biases(manifest.model):
        raise ConfigError(
            "train.bias_rate is set, and routers of this family have no selection biases",
            fix="leave it at 0, or take a model of a family like glm4_moe or deepseek_v3",
        )


def _config_in(path: Path) -> dict[str, Any]:
    """A model's config as a manifest has it."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = about_the_model(json.loads(file.read_text(encoding="utf-8")))
        built_expert_shape(ModelSpec(config=config))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{file} is no model to train: {error}", fix="take the config.json of a MoE family of transformers"
        ) from error
    if (config.get("vocab_size") or 0) < VOCAB_SIZE:
        raise ConfigError(f"{file} has a vocabulary below {VOCAB_SIZE}, and text is bytes", fix="set vocab_size to 256")
    return config


def _check_positions(config: Mapping[str, Any], manifest: Manifest, where: Path | str) -> None:
    """Raises ConfigError for a model that is not made for texts as long as the run's."""
    context_length = manifest.data.context_length
    positions = config.get("max_position_embeddings") or context_length
    if positions < context_length:
        raise ConfigError(
            f"{where} has {positions} positions, fewer than the {context_length} of the run",
            fix=f"give --set data.context_length={positions}, or another --preset",
        )


def _checkpoint_for(manifest: Manifest, seed: Path) -> Checkpoint:
    """The checkpoint in `seed`. Raises ConfigError if this run cannot start from it."""
    from ..seed.split import Checkpoint

    if manifest.model.private_layers:
        raise ConfigError("a run that starts from a checkpoint has no private layers", fix="leave one of both out")
    if manifest.train.expert_weights == "ternary":
        raise ConfigError("a checkpoint's experts are not ternary", fix="leave train.expert_weights as it is")
    checkpoint = Checkpoint(seed)
    _check_positions(checkpoint.config(), manifest, seed)
    if not checkpoint.tokenizer and checkpoint.vocabulary != VOCAB_SIZE:
        raise ConfigError(
            f"{seed} has no tokenizer.json, and a vocabulary of {checkpoint.vocabulary}, which is not that of bytes",
            fix="put its tokenizer beside it",
        )
    if checkpoint.tokenizer:
        _check_tokenizer(checkpoint.tokenizer, checkpoint.vocabulary, seed)
    return checkpoint


def _of_checkpoint(manifest: Manifest, checkpoint: Checkpoint, seed: Path) -> Manifest:
    """The same run, of the checkpoint's model and tokenizer."""
    model = msgspec.structs.replace(manifest.model, config=checkpoint.config())
    tokenizer: Literal["bytes", "seed"] = "seed" if checkpoint.tokenizer else "bytes"
    data = msgspec.structs.replace(manifest.data, tokenizer=tokenizer)
    manifest = msgspec.structs.replace(manifest, model=model, data=data)
    try:
        built_expert_shape(manifest.model)
    except ValueError as error:
        raise ConfigError(
            f"{seed} cannot start a run: {error}",
            fix="take one of a MoE family; `shoal upcycle` makes one of a dense checkpoint",
        ) from error
    return manifest


def _check_tokenizer(tokenizer_json: bytes, vocabulary: int, seed: Path) -> None:
    """Raises ConfigError for one that cannot be read, or has tokens that the model does not know."""
    from ..learning.tokenizer import Encoder

    try:
        tokens = Encoder(tokenizer_json, None).num_tokens
    except DataError as error:
        raise ConfigError(f"{seed}/tokenizer.json is none: {error.cause}", fix="put its tokenizer beside it") from error
    if tokens > vocabulary:
        raise ConfigError(
            f"{seed}/tokenizer.json has {tokens} tokens, and the model knows {vocabulary}",
            fix="put its own tokenizer beside it",
        )
