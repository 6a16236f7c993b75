"""Parts of a seed: only what the manifest and the index name is believed, from peers and from the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from shoal.node.seed.store import SeedMissing, SeedStore, experts_of, parse_index, standins_of, write_part
from shoal.protocol import resources
from shoal.protocol.errors import Refused
from shoal.protocol.messages import MAX_SLOTS


@pytest.fixture
def parts() -> list[bytes]:
    return [b"", os.urandom(1000), b"slot", b"standin", b"slot", b"other standin"]


@pytest.fixture
def founder(parts: list[bytes], tmp_path: Path) -> SeedStore:
    folder = tmp_path / "founder"
    index = msgspec.msgpack.encode([write_part(folder, part) for part in parts])
    return SeedStore(folder, write_part(folder, index).hex())


def test_all_of_it_travels(founder: SeedStore, parts: list[bytes], tmp_path: Path) -> None:
    joiner = SeedStore(tmp_path / "joiner", founder.start)
    assert joiner.digests is None
    assert joiner.part(0) is None
    assert joiner.nbytes(0) == 0
    index = founder.index_bytes()
    assert index is not None
    assert joiner.put_index(index)
    for number, data in enumerate(parts):
        assert joiner.put(number, founder.need(number)) or joiner.part(number) is not None
        assert joiner.part(number) == data
        assert joiner.nbytes(number) == len(data)
    assert joiner.part(len(parts)) is None
    assert len(list((tmp_path / "joiner").iterdir())) == len(set(parts)) + 1, "equal parts lie there once"
    again = SeedStore(tmp_path / "joiner", founder.start)
    assert again.need(experts_of(0)) == again.need(experts_of(1)) == b"slot"
    assert again.need(standins_of(1)) == b"other standin"


def test_what_is_not_named_is_not_kept(founder: SeedStore, tmp_path: Path) -> None:
    joiner = SeedStore(tmp_path / "joiner", founder.start)
    index = founder.index_bytes()
    assert index is not None
    for forged in (b"", index[:-1], index + b"\0", msgspec.msgpack.encode([b"short"]), os.urandom(100)):
        assert not joiner.put_index(forged)
    assert not joiner.put(1, founder.need(1)), "without the index nothing is known"
    assert joiner.put_index(index)
    assert not joiner.put(1, founder.need(1)[:-1])
    assert not joiner.put(1, founder.need(2))
    assert not joiner.put(99, b"anything")
    assert joiner.part(1) is None
    assert joiner.nbytes(1) == 0
    with pytest.raises(SeedMissing) as caught:
        joiner.need(1)
    assert caught.value.fix


def test_a_damaged_file_is_dropped_and_can_be_fetched_again(founder: SeedStore, tmp_path: Path) -> None:
    path = tmp_path / "founder" / founder.digests[1].hex()  # type: ignore[index]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert founder.part(1) is None
    assert founder.part(1) is None
    assert founder.put(1, whole)
    assert founder.part(1) == whole


@pytest.mark.parametrize("data", [b"", b"\xff", msgspec.msgpack.encode([b"x" * 31]), msgspec.msgpack.encode({"a": 1})])
def test_what_is_no_index(data: bytes) -> None:
    assert parse_index(data) is None


def test_names_of_parts() -> None:
    last = standins_of(MAX_SLOTS - 1)
    for name in (resources.seed(0), resources.seed(last), resources.seed_index()):
        assert resources.parse_resource(name).name == name
    for name in ("seed", "seed/-1", "seed-index/0", f"seed/{last + 1}"):
        with pytest.raises(Refused):
            resources.parse_resource(name)


def test_a_full_disk_is_named_and_keeps_no_halves(tmp_path: Path) -> None:
    name = hashlib.sha256(b"part").hexdigest()
    (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=name):
        write_part(tmp_path, b"part")
    assert list(tmp_path.iterdir()) == []
