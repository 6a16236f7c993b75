"""What a composer trains on, as tokens in a file of its own: made once, then mapped, so it may be larger than memory.

Two passes over the text. The first one learns each document's hash and size: these decide what is held out and what is
in this peer's shard. The second one writes the tokens of the shard, `TOGETHER` bytes of text at a time in hash order.

The file's name says what it was made from, how many tokens it has and of which type. When files of the text, the shard
or the tokenizer change, another one is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..logs import get_logger
from .data import Document, Encode, Tokens, documents_in, files_of, num_held_out, shard_of
from .text_files import DataError

log = get_logger(__name__)

TOGETHER = 24 << 20  # more than the standard library has, so that its tokens are in hash order as a whole
CHECKED_BYTES = SAID_EVERY = 16 << 20
PARTIAL = "partial"
FORMAT = b"1"  # of the file, and of what is held out and how shards are cut

Say = Callable[[str], None]

_NAME = re.compile(r"[0-9a-f]{32}-\d+\.(uint8|int32)")


def check_text(source: str, most: int = CHECKED_BYTES) -> tuple[int, int]:
    """Read the first `most` bytes of a text, as what is wrong with one mostly shows there.

    Returns:
        How many documents and bytes there are; more than `most` bytes if that is not all.

    Raises:
        DataError: as `training_tokens`.
    """
    keys: set[int] = set()
    read = 0
    for document in documents_in(source):
        keys.add(document.key)
        read += len(document.text)
        if read > most and len(keys) > 1:
            break
    num_held_out(source, np.array(sorted(keys), dtype=np.uint64))
    return len(keys), read


def training_tokens(
    source: str,
    folder: Path,
    *,
    shard: tuple[int, int],
    encode: Encode,
    tokenizer: bytes = b"",
    say: Say = lambda _: None,
) -> Tokens:
    """Tokens of all documents of a shard that are not held out, memory-mapped and read-only.

    Args:
        source: see `documents_in`.
        folder: for the file. Those that were made from something else are removed.
        shard: (index, of how many).
        tokenizer: what `encode` is a function of.
        say: told how far it is, now and then.

    Raises:
        DataError: something cannot be read, there is not enough for both sides of the split or for this shard, or the
            file cannot be written.
    """
    made_from = _made_from(source, shard, tokenizer)
    tokens = _open(folder, made_from)
    if tokens is None:
        tokens = _make(source, folder, made_from, shard, encode, say)
    return tokens


def _made_from(source: str, shard: tuple[int, int], tokenizer: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16, person=b"shoal-tokens")
    for part in (FORMAT, os.fsencode(source), repr(shard).encode(), hashlib.blake2b(tokenizer).digest()):
        digest.update(len(part).to_bytes(8) + part)
    for path in files_of(source)[1]:
        with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
            found = path.stat()
            digest.update(os.fsencode(path) + f"\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _open(folder: Path, made_from: str) -> Tokens | None:
    """The finished file, or None."""
    for path in folder.glob(f"{made_from}-*"):
        if not _NAME.fullmatch(path.name):
            continue
        count, kind = path.name.removeprefix(f"{made_from}-").split(".")
        dtype = np.dtype(kind)
        if int(count) == 0:
            return np.zeros(0, dtype=dtype)  # which cannot be mapped
        if path.stat().st_size == int(count) * dtype.itemsize:
            return np.memmap(path, dtype=dtype, mode="r")
    return None


def _make(source: str, folder: Path, made_from: str, shard: tuple[int, int], encode: Encode, say: Say) -> Tokens:
    wanted, num_bytes = _documents_of(source, shard, say)
    partial = folder / PARTIAL
    count, dtype = 0, "uint8"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old == partial or _NAME.fullmatch(old.name):
                old.unlink()
        secret = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # as the text may be
        with open(secret, "wb") as file:
            for documents in _batches(source, wanted, num_bytes, say):
                tokens = encode(documents)
                count, dtype = count + len(tokens), tokens.dtype.name
                file.write(tokens.data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / f"{made_from}-{count}.{dtype}")
    except OSError as error:
        fix = f"about {num_bytes / 1e9:.1f} GB must be free there; --data-shard takes a part of the text"
        raise DataError(f"cannot write the text's tokens to {folder}: {error.strerror}", fix=fix) from error
    finally:
        with contextlib.suppress(OSError):  # it is there only if something went wrong
            partial.unlink()
    log.info("text.read", source=source, documents=len(wanted), bytes=num_bytes, tokens=count)
    made = _open(folder, made_from)
    assert made is not None
    return made


def _documents_of(source: str, shard: tuple[int, int], say: Say) -> tuple[npt.NDArray[np.uint64], int]:
    """Keys of a shard's documents, in order, and their bytes."""
    all_keys, all_sizes, read, said = array("Q"), array("I"), 0, 0
    for document in documents_in(source):
        all_keys.append(document.key)
        all_sizes.append(len(document.text))
        read += len(document.text)
        if read >= said + SAID_EVERY:
            said = read
            say(f"reading the text: {read / 1e6:,.0f} MB")
    keys, first = np.unique(np.asarray(all_keys), return_index=True)
    sizes = np.asarray(all_sizes)[first].astype(np.int64)
    held = num_held_out(source, keys)
    chosen = shard_of(sizes[held:], *shard)
    return keys[held:][chosen], int(sizes[held:][chosen].sum())


def _batches(source: str, wanted: npt.NDArray[np.uint64], num_bytes: int, say: Say) -> Iterator[list[Document]]:
    """The documents with these keys, each once, some at a time in hash order."""
    missing = np.ones(len(wanted), dtype=np.bool_)
    together: list[Document] = []
    size = done = 0
    for document in documents_in(source):
        place = int(np.searchsorted(wanted, np.uint64(document.key)))
        if place == len(wanted) or wanted[place] != document.key or not missing[place]:
            continue
        missing[place] = False
        together.append(document)
        size, done = size + len(document.text), done + len(document.text)
        if size >= TOGETHER:
            say(f"making tokens of the text: {done / 1e6:,.0f} of {num_bytes / 1e6:,.0f} MB")
            yield sorted(together)
            together, size = [], 0
    yield sorted(together)
