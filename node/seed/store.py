"""Parts of a seed on disk, named by what is in them: equal ones lie there once, and are fetched once.

A seed is an index and what it lists by number: 0 the tokenizer (empty: bytes are tokens), 1 the backbone, then for each
slot its experts and their first stand-ins, then for each layer its bases, where stand-ins are corrections of what
experts have in common (`kernels/shared.py`). `ModelSpec.start` is the sha256 of the index, so the manifest says it all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from ...protocol.errors import ShoalError
from ..storage.whole_file import write_whole

TOKENIZER, BACKBONE, _FIRST_SLOT = 0, 1, 2
DIGEST_BYTES = 32


class SeedMissing(ShoalError):
    """A part of the seed that the run starts from is not here and could not be had from any peer."""

    code = "SHOAL-245"


def experts_of(slot: int) -> int:
    """Number of the part with a slot's experts."""
    return _FIRST_SLOT + 2 * slot


def standins_of(slot: int) -> int:
    """Number of the part with their first stand-ins."""
    return _FIRST_SLOT + 2 * slot + 1


def bases_from(num_slots: int) -> int:
    """Number of the part with the first layer's bases, if there are any."""
    return _FIRST_SLOT + 2 * num_slots


class SeedStore:
    """A folder of parts. Safe to read from any thread; a part is whole or not there.

    Args:
        folder: made when something is put in.
        start: hex sha256 of the index, from the manifest.
    """

    def __init__(self, folder: Path, start: str) -> None:
        self._folder, self.start = folder, start
        self._index: list[bytes] | None = None

    @property
    def digests(self) -> list[bytes] | None:
        """sha256 of every part by number; None while the index is not here."""
        if self._index is None:
            data = self._read(bytes.fromhex(self.start))
            self._index = None if data is None else parse_index(data)
        return self._index

    def index_bytes(self) -> bytes | None:
        """For others to fetch."""
        return self._read(bytes.fromhex(self.start))

    def put_index(self, data: bytes) -> bool:
        """Keep it if it is the one that the manifest names."""
        if hashlib.sha256(data).hexdigest() != self.start or parse_index(data) is None:
            return False
        write_part(self._folder, data)
        return True

    def name(self, number: int) -> str:
        """Hex sha256 of a part, which others may have too; empty if the index does not list it."""
        digests = self.digests
        return digests[number].hex() if digests is not None and number < len(digests) else ""

    def nbytes(self, number: int) -> int:
        """Of a part; 0 if it is not here."""
        digests = self.digests
        if digests is None or number >= len(digests):
            return 0
        try:
            return self._path(digests[number]).stat().st_size
        except FileNotFoundError:
            return 0

    def part(self, number: int) -> bytes | None:
        """What is here of it: a damaged file is dropped, and None."""
        digests = self.digests
        return None if digests is None or number >= len(digests) else self._read(digests[number])

    def put(self, number: int, data: bytes) -> bool:
        """Keep a part that came from a peer, if it is what the index says."""
        digests = self.digests
        if digests is None or number >= len(digests) or hashlib.sha256(data).digest() != digests[number]:
            return False
        write_part(self._folder, data)
        return True

    def need(self, number: int) -> bytes:
        """Raises SeedMissing if it is not here."""
        data = self.part(number)
        if data is None:
            raise SeedMissing(f"part {number} of the run's seed is not here", fix="start the peer again: it fetches it")
        return data

    def _path(self, digest: bytes) -> Path:
        return self._folder / digest.hex()

    def _read(self, digest: bytes) -> bytes | None:
        path = self._path(digest)
        if not path.exists():
            return None
        data = path.read_bytes()
        if hashlib.sha256(data).digest() != digest:
            path.unlink()
            return None
        return data


def parse_index(data: bytes) -> list[bytes] | None:
    """None if it is none."""
    try:
        digests = msgspec.msgpack.decode(data, type=list[bytes])
    except msgspec.DecodeError:
        return None
    return digests if all(len(digest) == DIGEST_BYTES for digest in digests) else None


def write_part(folder: Path, data: bytes) -> bytes:
    """Write it under its digest, which is returned. OSError, which names the file, if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data).digest()
    path = folder / digest.hex()
    if not path.exists():
        write_whole(path, data)
    return digest
