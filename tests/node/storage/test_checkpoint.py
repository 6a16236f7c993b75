"""Checkpoints: complete or not there, whatever happens to the writer or the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shoal.node.storage import checkpoint
from shoal.node.storage.checkpoint import CheckpointError, CheckpointStore, DiskFull


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"a/weight": torch.full((64, 1024), float(step)), "b": torch.tensor(step), "c": torch.ones(3).bfloat16()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_round_trip(store: CheckpointStore) -> None:
    assert store.latest() is None
    meta = {"run": "r", "slots": [1, 2], "data": {"seed": 2**62, "position": 3}}
    path = store.save(7, state_of(7), meta)
    found = CheckpointStore(store.folder).latest()
    assert found is not None
    assert (found.step, found.meta, found.path) == (7, meta, path)
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in state_of(7).items()
    }
    assert all(torch.equal(found.tensors[n], t) for n, t in state_of(7).items())


def test_keeps_the_last_ones_saved(store: CheckpointStore) -> None:
    for step in (10, 20, 30, 20):  # the last: a step trained again after a resume
        store.save(step, state_of(step), {})
    found = store.latest()
    assert found is not None
    assert found.step == 20
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "0000000003-step-0000000030",
        "0000000004-step-0000000020",
    ]


def test_tied_and_strided_tensors(store: CheckpointStore) -> None:
    base = torch.randn(4, 6)
    state = {"embed": base, "head": base, "row": base[1], "transposed": base.t(), "grad": base.clone().requires_grad_()}
    store.save(1, state, {})
    found = store.latest()
    assert found is not None
    assert all(torch.equal(found.tensors[n], t) for n, t in state.items())


def truncate(path: Path) -> None:
    os.truncate(path / checkpoint.TENSORS, (path / checkpoint.TENSORS).stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / checkpoint.TENSORS).read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    (path / checkpoint.TENSORS).write_bytes(data)


def edit_meta(path: Path) -> None:
    (path / checkpoint.META).write_text((path / checkpoint.META).read_text().replace('"step": 2', '"step": 3'))


def list_for_meta(path: Path) -> None:
    (path / checkpoint.META).write_text("[]")


def remove_meta(path: Path) -> None:
    (path / checkpoint.META).unlink()


def other_format(path: Path) -> None:
    body = json.loads((path / checkpoint.META).read_text())
    del body["self"]
    body["format"] = 99
    (path / checkpoint.META).write_text(json.dumps({**body, "self": checkpoint._self_digest(body)}))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, edit_meta, list_for_meta, remove_meta, other_format])
def test_damaged_ones_are_skipped_with_a_reason(
    store: CheckpointStore, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(1, state_of(1), {})
    damage(store.save(2, state_of(2), {}))
    found = store.latest()
    assert found is not None
    assert found.step == 1
    assert "checkpoint skipped" in caplog.text
    store.save(3, state_of(3), {})
    found = store.latest()
    assert found is not None
    assert found.step == 3


def test_no_room_is_known_before_writing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(1, state_of(1), {})
    usage = shutil.disk_usage(store.folder)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="no room") as full:
        store.save(2, state_of(2), {})
    assert full.value.fix
    found = store.latest()
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("failing", ["_sync", "save_file"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (checkpoint.SafetensorError("Error: I/O error: No space left on device (os error 28)"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
    ],
)
def test_failed_writes_lose_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception, expected: type[Exception]
) -> None:
    store.save(1, state_of(1), {})
    store.save(2, state_of(2), {})

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, failing, fail)
        with pytest.raises(expected) as raised:
            store.save(3, state_of(3), {})
        assert type(raised.value) is expected
    assert len(list(store.folder.iterdir())) == 2
    found = store.latest()
    assert found is not None
    assert found.step == 2


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_really_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before writing is blinded, as if another process took the room in between."""
    usage = shutil.disk_usage(tmp_path)
    with small_disk(tmp_path / "disk"):
        store = CheckpointStore(tmp_path / "disk")
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        store.save(1, {"a": torch.ones(100_000)}, {})
        with pytest.raises(DiskFull):
            store.save(2, {"a": torch.ones(200_000)}, {})
        found = store.latest()
        assert found is not None
        assert found.step == 1
        store.save(3, {"a": torch.ones(100_000)}, {})


WRITER = textwrap.dedent(
    """
    import os, sys, torch
    from pathlib import Path
    from shoal.node.storage.checkpoint import CheckpointStore
    torch.set_num_threads(1)
    store = CheckpointStore(Path(sys.argv[1]), keep=2)
    while sys.stdin.readline():  # one line: a life; forked, so that lives are cheap
        child = os.fork()
        if child == 0:
            found = store.latest()
            step = found.step if found else 0
            os.write(1, f"pid {os.getpid()}\\n".encode())
            while True:
                step += 1
                store.save(step, {"a": torch.full((16, 1024), float(step)), "b": torch.tensor(step)}, {"step": step})
                os.write(1, f"{step}\\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"dead\\n")
    """
)


def test_killed_writers_leave_complete_checkpoints_not_older_than_acknowledged(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    seed = random.getrandbits(32)
    chance = random.Random(seed)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    acknowledged, interrupted, buffered = 0, 0, b""
    save_seconds = 0.01  # the last one's
    try:
        for _ in range(60):
            writer.stdin.write(b"\n")
            kill_at, killed = None, False
            saves_left = chance.randrange(
                3
            )  # a life ends at some moment of the save after these, however slow the machine
            began = 0.0
            while True:
                while b"\n" in buffered:
                    line, buffered = buffered.split(b"\n", 1)
                    if line.startswith(b"pid"):
                        child = int(line[3:])
                        began = time.monotonic()
                    elif line != b"dead":
                        acknowledged = int(line)
                        began, save_seconds = time.monotonic(), time.monotonic() - began
                        saves_left -= 1
                    else:
                        break
                    if saves_left <= 0 and kill_at is None:
                        kill_at = began + chance.uniform(0, save_seconds)
                else:
                    remaining = 60.0 if kill_at is None or killed else max(0.0, kill_at - time.monotonic())
                    if select.select([writer.stdout], [], [], remaining)[0]:
                        received = os.read(writer.stdout.fileno(), 65536)
                        assert received, "the writer died by itself"
                        buffered += received
                    else:
                        assert kill_at is not None, "the writer hangs"
                        assert not killed, "the writer survived SIGKILL"
                        os.kill(child, signal.SIGKILL)
                        killed = True
                    continue
                break
            interrupted += (folder / checkpoint.PARTIAL).exists()
            found = CheckpointStore(folder).latest()
            assert found is not None or acknowledged == 0, f"seed {seed}"
            if found is not None:
                assert found.step >= acknowledged, f"seed {seed}"
                assert found.meta == {"step": found.step}
                assert torch.equal(found.tensors["a"], torch.full((16, 1024), float(found.step)))
    finally:
        writer.stdin.close()
        if writer.poll() is None:
            writer.kill()
        writer.wait()
        writer.stdout.close()
    assert acknowledged > 10
    assert interrupted > 3, "no life was cut short inside a save: the test shows nothing"
    CheckpointStore(folder, keep=2).save(acknowledged + 1, {}, {})
    assert len(list(folder.iterdir())) == 2, "what killed writers left is cleared away by the next save"
