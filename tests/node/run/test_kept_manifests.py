"""Manifests on disk: a founder finds its run again, whatever else its directory was used for."""

from __future__ import annotations

import errno
import random
import secrets
from pathlib import Path
from typing import Any

import msgspec
import pytest
from shoal.node.run.kept_manifests import ONE_FOR_ALL, asked_otherwise, founded_before, keep_manifest, manifest_file
from shoal.node.run.manifest import Manifest, ModelSpec, canonical_bytes, run_id_of, sign, with_settings
from shoal.node.run.manifest_errors import ManifestError, ProtocolMismatch
from shoal.protocol.directory.records import seal_manifest
from shoal.protocol.identity import Identity


def a_run(founder: Identity, name: str, created_at: int = 1_700_000_000) -> tuple[str, bytes]:
    """Its id and its signed manifest; no two are the same."""
    config = {"model_type": "qwen3_moe", "salt": secrets.token_hex(4)}
    made = Manifest(name=name, founder=founder.peer_id, created_at=created_at, model=ModelSpec(config=config))
    return run_id_of(made), sign(founder, made)


def of_a_later_protocol(founder: Identity, name: str) -> bytes:
    made = Manifest(name=name, founder=founder.peer_id, created_at=1, model=ModelSpec(config={}))
    fields: dict[str, Any] = msgspec.msgpack.decode(canonical_bytes(made))
    data = msgspec.msgpack.encode(fields | {"protocol_version": 99}, order="sorted")
    return seal_manifest(data, founder.sign(b"shoal/1 manifest" + data))


@pytest.fixture
def founder() -> Identity:
    return Identity.generate()


def test_each_run_is_found_by_its_name(tmp_path: Path, founder: Identity) -> None:
    runs = {name: a_run(founder, name) for name in ("aaa", "bbb", "aaa-b")}
    for run_id, signed in runs.values():
        keep_manifest(tmp_path, run_id, signed)
    keep_manifest(tmp_path, *a_run(Identity.generate(), "ccc"))  # it only joined that one
    for name, (run_id, signed) in runs.items():
        found = founded_before(tmp_path, founder.peer_id, name)
        assert found is not None
        assert (found.run_id, found.signed, found.manifest.name) == (run_id, signed, name)
    for name in ("aa", "ccc", "a"):
        assert founded_before(tmp_path, founder.peer_id, name) is None
    assert founded_before(tmp_path, Identity.generate().peer_id, "aaa") is None


def test_what_a_founder_asks_for_in_vain_is_named() -> None:
    made = Manifest(name="aaa", founder="me", created_at=1, model=ModelSpec(config={"model_type": "qwen3_moe"}))
    again = msgspec.structs.replace(made, created_at=2)
    assert not asked_otherwise(made, again)
    asked = with_settings(again, ["train.steps=7", "sketch.kappa=20"])
    assert asked_otherwise(made, asked) == ["train.steps", "sketch.kappa"]


def test_of_several_the_newest_counts(tmp_path: Path, founder: Identity) -> None:
    runs = [a_run(founder, "aaa", created_at) for created_at in range(1, 6)]
    for run in random.sample(runs, len(runs)):
        keep_manifest(tmp_path, *run)
    found = founded_before(tmp_path, founder.peer_id, "aaa")
    assert found is not None
    assert found.run_id == runs[-1][0]


def test_what_an_earlier_version_kept_is_found(tmp_path: Path, founder: Identity) -> None:
    run_id, signed = a_run(founder, "aaa")
    (tmp_path / ONE_FOR_ALL).write_bytes(signed)
    found = founded_before(tmp_path, founder.peer_id, "aaa")
    assert found is not None
    assert found.run_id == run_id
    assert founded_before(tmp_path, founder.peer_id, "bbb") is None


@pytest.mark.parametrize("damage", [b"", b"\x93nothing", "half", "other"])
def test_a_damaged_file_does_not_hide_another(tmp_path: Path, founder: Identity, damage: bytes | str) -> None:
    run_id, signed = a_run(founder, "aaa")
    if damage == "other":
        bad = a_run(founder, "aaa")[1]  # whole, and not of the run that its file is named after
    else:
        bad = signed[: len(signed) // 2] if isinstance(damage, str) else damage
    path = manifest_file(tmp_path, run_id)
    path.write_bytes(bad)
    with pytest.raises(ManifestError, match=path.name) as caught:
        founded_before(tmp_path, founder.peer_id, "aaa")
    assert "join" in caught.value.fix
    assert founded_before(tmp_path, founder.peer_id, "bbb") is None, "that file is of no run of this name"

    keep_manifest(tmp_path, run_id, signed)
    (tmp_path / ONE_FOR_ALL).write_bytes(bad if damage != "other" else b"")
    found = founded_before(tmp_path, founder.peer_id, "aaa")
    assert found is not None
    assert found.run_id == run_id


def test_an_unreadable_old_file_may_be_of_any_run(tmp_path: Path, founder: Identity) -> None:
    (tmp_path / ONE_FOR_ALL).mkdir()
    with pytest.raises(ManifestError, match="directory"):
        founded_before(tmp_path, founder.peer_id, "aaa")


def test_a_run_of_a_later_protocol_says_so(tmp_path: Path, founder: Identity) -> None:
    (tmp_path / ONE_FOR_ALL).write_bytes(of_a_later_protocol(founder, "aaa"))
    with pytest.raises(ProtocolMismatch, match="99"):
        founded_before(tmp_path, founder.peer_id, "aaa")


def test_the_same_is_not_written_again(tmp_path: Path, founder: Identity) -> None:
    run_id, signed = a_run(founder, "aaa")
    keep_manifest(tmp_path, run_id, signed)
    before = manifest_file(tmp_path, run_id).stat()
    keep_manifest(tmp_path, run_id, signed)
    after = manifest_file(tmp_path, run_id).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == [manifest_file(tmp_path, run_id).name]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, founder: Identity) -> None:
    run_id, signed = a_run(founder, "aaa")
    path = manifest_file(tmp_path, run_id)
    keep_manifest(tmp_path, run_id, signed)
    path.with_name(f"{path.name}.tmp").symlink_to("/dev/full")  # what writes there has no room
    with pytest.raises(OSError, match="No space left") as caught:
        keep_manifest(tmp_path, run_id, b"another")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == signed
