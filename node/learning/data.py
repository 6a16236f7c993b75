"""Text to train on: byte tokens, a held-out split that all peers agree on, and shards that do not overlap.

A corpus is a list of documents: files, or what text_files.py finds in them; long ones are cut at line ends. Each has a
hash, and every decision below is a function of that hash alone, so peers agree without talking:

- held out for evaluation: the documents whose hash falls into the lowest `HELDOUT_FRACTION` of the hash space;
- `shard(i, n)`: the others in hash order, cut into n runs of about equal bytes, for a known number of composers. Those
  who take all of it draw their windows by a seed of their own.

The standard library's documents are hashed by their name, because peers may run different Python versions and a file
edited between two of them must stay on one side of the split. A peer's own documents are hashed by content: names
mean nothing there.

Tokens are bytes (vocabulary 256), unless a run brings a tokenizer. Every document ends with byte 0, which text does not
contain.
"""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from .text_files import DOCUMENT_BYTES, DataError, NotText, files_in, pieces_in

log = logging.getLogger(__name__)

VOCAB_SIZE = 256
END_OF_DOCUMENT = b"\0"
HELDOUT_FRACTION = 0.05
MAX_CORPUS_BYTES = 1 << 30  # of a text that is held in memory
STDLIB_SKIPPED = {"__pycache__", "dist-packages", "ensurepip", "idle_test", "site-packages", "test", "tests"}

Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.int32]


@dataclass(frozen=True, order=True)
class Document:
    """One piece of text. Sorts by hash."""

    digest: bytes  # 16 bytes; the split, the shard and the order are functions of it
    text: bytes = field(compare=False)

    @property
    def key(self) -> int:
        """64 bits of its hash, which have the same order."""
        return int.from_bytes(self.digest[:8])


Encode = Callable[[Sequence[Document]], Tokens]  # documents one after another, as tokens; by default `tokens_of`


@dataclass(frozen=True)
class Corpus:
    """Documents in hash order, split into training and held-out ones."""

    source: str
    train: tuple[Document, ...]
    heldout_documents: tuple[Document, ...]

    @property
    def train_bytes(self) -> int:
        return sum(len(document.text) for document in self.train)

    def shard(self, index: int, num_shards: int, encode: Encode | None = None) -> Tokens:
        """Training tokens of shard `index` of `num_shards`: disjoint, complete, equal to within one document."""
        sizes = np.array([len(document.text) for document in self.train], dtype=np.int64)
        return (encode or tokens_of)(self.train[shard_of(sizes, index, num_shards)])

    def heldout(self, windows: int, context_length: int, seed: int = 0, encode: Encode | None = None) -> torch.Tensor:
        """The fixed evaluation set, (windows, context_length) int64: equal on every peer with this corpus and seed."""
        return Batches((encode or tokens_of)(self.heldout_documents), windows, context_length, seed=seed).next()


def load_corpus(source: str, *, max_bytes: int = MAX_CORPUS_BYTES) -> Corpus:
    """A text in memory; what is beyond `max_bytes` of its documents is left out with a warning.

    Raises DataError as `documents_in`, or if there is not enough for both sides of the split.
    """
    documents: dict[bytes, Document] = {}  # the same text twice would otherwise be on both sides of the split
    read = 0
    for document in documents_in(source):
        read += len(document.text)
        if read > max_bytes:
            log.warning("corpus cut source=%s kept_bytes=%d", source, max_bytes)
            break
        documents[document.digest] = document
    ordered = tuple(sorted(documents.values()))
    keys = np.array([document.key for document in ordered], dtype=np.uint64)
    held = num_held_out(source, keys)
    return Corpus(source, ordered[held:], ordered[:held])


def documents_in(source: str) -> Iterator[Document]:
    """All documents of `stdlib`, of a file, or of a folder of files (recursively, without hidden or binary ones).

    In the order of files, and as often as they are there. They are not kept: the text may be larger than memory.

    Raises DataError if something cannot be read.
    """
    root, paths = files_of(source)
    binary = 0
    for path in paths:
        try:
            for number, piece in enumerate(pieces_in(path)):
                named = f"{path.relative_to(root).as_posix()}#{number}".encode() if source == "stdlib" else piece
                yield Document(hashlib.blake2b(named, digest_size=16, person=b"shoal-doc").digest(), piece)
        except NotText:
            binary += 1
            log.debug("corpus left out file=%s", path)
    if binary:
        log.warning("corpus left out source=%s files=%d why=%s", source, binary, "they are not UTF-8 text")


def files_of(source: str) -> tuple[Path, list[Path]]:
    """Where a text is, and its files in order. DataError if there is nothing, or a folder cannot be read."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, [path for path in files_in(root, STDLIB_SKIPPED.__contains__) if path.suffix == ".py"]
    root = Path(source).expanduser()
    if not root.exists():
        raise DataError(
            f"no text at {source!r}: it does not exist", fix="point --data at a file of text or a folder of them"
        )
    return root, [root] if root.is_file() else files_in(root, lambda name: name.startswith("."))


def num_held_out(source: str, keys: npt.NDArray[np.uint64]) -> int:
    """How many of a text's documents are held out: the first ones in hash order.

    Args:
        keys: of its documents, in order, each once.

    Raises DataError if there is none, or only one.
    """
    if not len(keys):
        raise DataError(f"no text at {source!r}", fix="point --data at a file of text or a folder of them")
    if len(keys) == 1:
        raise DataError(
            f"too little text at {source!r}: one document cannot be split into training and held-out text",
            fix=f"use more text: more files, or one file of over {2 * DOCUMENT_BYTES} bytes",
        )
    # Of a handful all may have fallen on one side: the lowest hash is held out, so that there is an evaluation, and the
    # highest is trained on.
    return min(max(int(np.searchsorted(keys, np.uint64(HELDOUT_FRACTION * 2**64))), 1), len(keys) - 1)


def shard_of(sizes: npt.NDArray[np.int64], index: int, num_shards: int) -> slice:
    """Which of the documents that are trained on are shard `index` of `num_shards`.

    Args:
        sizes: their bytes, in hash order.
    """
    if not 0 <= index < num_shards:
        raise ValueError(f"shard {index} of {num_shards} does not exist")
    ends = sizes.cumsum()
    shards = ((ends - sizes / 2) * num_shards / ends[-1]).astype(np.int64)  # by each one's middle
    first, last = np.searchsorted(np.minimum(shards, num_shards - 1), [index, index + 1])
    return slice(int(first), int(last))


def seed_of_peer(peer_id: str, run_id: str) -> int:
    """Seed of a composer's `Batches`, 63 bits: composers that share documents still draw different windows."""
    digest = hashlib.blake2b(f"{run_id}/{peer_id}".encode(), digest_size=8, person=b"shoal-batch").digest()
    return int.from_bytes(digest) >> 1


def tokens_of(documents: Sequence[Document]) -> Tokens:
    """The documents' bytes one after another, each followed by byte 0."""
    return np.frombuffer(b"".join(document.text + END_OF_DOCUMENT for document in documents), dtype=np.uint8)


class BatchesState(TypedDict):
    """Where a sampler stands. JSON-able."""

    seed: int
    position: int


class Batches:
    """Endless batches of random windows, (batch_size, context_length) int64.

    Batch n is a function of (tokens, seed, n), so that a resumed peer goes on where it stopped with nothing but two
    numbers.

    Args:
        tokens: uint8 or int32, one-dimensional, in memory or memory-mapped.
        batch_size: windows a batch.
        context_length: tokens a window.
        seed: 0 to 2**63 - 1.
        num_tokens: that there are, if the tokens come from a disk, which may have damaged them.
    Raises DataError if the tokens do not fill one window; `next` does if one is not among `num_tokens`.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, context_length: int, *, seed: int, num_tokens: int | None = None
    ) -> None:
        if len(tokens) < context_length:
            raise DataError(
                f"too little text: {len(tokens)} bytes do not fill one window of {context_length}",
                fix="use more text, a larger part of it by --data-shard, or a shorter context length",
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.num_tokens = num_tokens
        self.seed = seed
        self.position = 0  # batches drawn so far

    def next(self) -> torch.Tensor:
        """Draws the next batch."""
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, self.position], dtype=np.uint64)))
        starts = random.integers(0, len(self.tokens) - self.context_length + 1, size=self.batch_size)
        windows = self.tokens[starts[:, None] + np.arange(self.context_length)]
        if self.num_tokens is not None and not 0 <= windows.min() <= windows.max() < self.num_tokens:
            raise DataError("the file of the text's tokens is damaged", fix="remove `tokens` from the data directory")
        self.position += 1
        return torch.from_numpy(windows.astype(np.int64))

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield self.next()

    def state_dict(self) -> BatchesState:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: BatchesState) -> None:
        """Continues from a `state_dict`. If the text has changed since, the windows differ and nothing else does."""
        self.seed, self.position = state["seed"], state["position"]
