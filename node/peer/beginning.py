"""What a composer begins with: the run's checkpoint, its text, its model, and what its own disk has of all that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...protocol.averaging.merging import digest as digest_of
from ..backbone.common_state import Held
from ..capacity import device_to_use
from ..config import PeerConfig
from ..learning.composer import Composer
from ..learning.data import Batches, Encode, seed_of_peer, tokens_of
from ..learning.expert_mode import ExpertMode
from ..learning.token_file import training_tokens
from ..learning.tokenizer import Encoder
from ..run.manifest_errors import ManifestError
from ..seed.joining import SeedAtHome
from ..seed.store import TOKENIZER
from ..slots.slot_order import LayerOrder
from ..storage.checkpoint import CheckpointStore
from .links import Links
from .restoring import Restored, restore_composer

if TYPE_CHECKING:
    from ..model.start import Start
    from ..run.manifest import Run


def seed_of(config: PeerConfig, run: Run, links: Links) -> SeedAtHome | None:
    """The checkpoint that the run starts from; None if it starts from nothing."""
    if not run.manifest.model.start:
        return None
    return SeedAtHome(links, config.data_dir / "seed", config.join_seconds)


def batches_of(
    config: PeerConfig,
    run: Run,
    peer_id: str,
    seed: SeedAtHome | None,
    *,
    say: Callable[[str], None],
    beat: Callable[[], None],
) -> Batches:
    """Windows of this peer's shard of its text, drawn by its own seed.

    Args:
        seed: with its tokenizer fetched, where the run's tokens are that one's.
        say: told how far it is, now and then, while text becomes tokens.
        beat: called more often than that.
    """
    manifest = run.manifest
    encode: Encode = tokens_of
    tokenizer, end = b"", manifest.model.config.get("eos_token_id")
    if manifest.data.tokenizer == "seed":
        assert seed is not None
        tokenizer = seed.store.need(TOKENIZER)
        encode = Encoder(tokenizer, end, progress=beat)
    tokens = training_tokens(
        text_of(config, run),
        config.data_dir / "tokens",
        shard=config.data_shard or (0, 1),
        encode=encode,
        tokenizer=tokenizer + repr(end).encode() if tokenizer else b"",
        say=say,
    )
    return Batches(
        tokens,
        manifest.train.batch_size,
        manifest.data.context_length,
        seed=seed_of_peer(peer_id, run.run_id),
        num_tokens=manifest.model.config.get("vocab_size"),
    )


def text_of(config: PeerConfig, run: Run) -> str:
    """Its own, or the run's."""
    return config.data if config.data != "stdlib" else run.manifest.data.corpus


def composer_of(config: PeerConfig, run: Run, peer_id: str, start: Start, batches: Batches) -> Composer:
    """The run's model as it is at step 0, without experts of its own yet.

    Raises:
        ManifestError: the manifest describes none that can be built.
    """
    device = device_to_use(config.device)
    try:
        return Composer(
            run.manifest,
            owned=(),
            next_batch=batches.next,
            fit_seed=seed_of_peer(peer_id, run.run_id) % (1 << 31),
            start=start,
            device=device,
            mode=ExpertMode.of(config, run.manifest.train),
        )
    except ValueError as error:
        raise ManifestError(f"the model cannot be built: {error}", fix="ask the founder for another run") from error


def go_on(
    store: CheckpointStore, composer: Composer, batches: Batches, order: LayerOrder
) -> tuple[list[Held], Restored]:
    """Put `composer` and `batches` where the newest checkpoint has them, if there is one.

    Returns:
        The common state of each fragment, and the slots and stand-ins that were saved.
    """
    found = restore_composer(store, composer, batches, order)
    if found is None:
        found = Restored([-1] * len(composer.fragments), {}, {})
    digests = [digest_of(c, m) for c, m in zip(composer.common, composer.momentum, strict=True)]
    return [Held(number, digest) for number, digest in zip(found.rounds, digests, strict=True)], found
