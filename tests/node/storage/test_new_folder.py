"""Folders that commands make: whole or not there, and refused before the work is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shoal.node import logs
from shoal.node.cli import main
from shoal.node.errors import ConfigError
from shoal.node.storage.new_folder import NotWritten, new_folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def impossible(folder: Path) -> list[Path]:
    """Where no folder can be made."""
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to(folder / "nothing")
    return [folder, folder / "file", folder / "dangling", folder / "file" / "below", Path("/proc/nobody/out")]


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
        assert folder.parent == out.parent, "a rename cannot leave the file system"
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["where"]
    assert (out / "a").read_text() == "a"


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """As a model that a container's root exports. safetensors writes for one user alone."""
    with new_folder(tmp_path / "model") as folder:
        (folder / "below").mkdir()
        for path in (folder / "weights", folder / "below" / "more"):
            save_file({"a": torch.zeros(3)}, path)
    plain = tmp_path / "plain"
    plain.write_text("")
    modes = {path.stat().st_mode & 0o777 for path in (plain, *(tmp_path / "model").rglob("*")) if path.is_file()}
    assert len(modes) == 1


def test_a_checkpoint_that_may_not_be_read_is_not_called_missing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (tmp_path / "model.safetensors").chmod(0)
    program = "import sys\nfrom shoal.node.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "evaluate", str(tmp_path)]
    if os.geteuid() == 0:  # who may read everything
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"{tmp_path / 'model.safetensors'} may not be read" in done.stderr


def fail_halfway(out: Path, error: type[BaseException]) -> None:
    with new_folder(out) as folder:
        (folder / "half").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, PermissionError])
def test_nothing_is_left_of_one_that_failed(error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second try is not told that it exists already
        with pytest.raises(error):
            fail_halfway(out, error)
        assert not [*tmp_path.iterdir()]


def test_where_it_cannot_be_made_nothing_is_begun(tmp_path: Path) -> None:
    for out in impossible(tmp_path):
        with pytest.raises(ConfigError, match=r"exists already|cannot be made") as caught, new_folder(out):
            raise AssertionError("the work has begun")
        assert str(out) in caught.value.cause
        assert caught.value.fix


WRITERS: dict[str, Callable[[Path], object]] = {
    "plainly": lambda path: path.write_bytes(bytes(2 << 20)),
    "safetensors": lambda path: save_file({"a": torch.ones(500_000)}, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_named_and_cleared(kind: str, small_disk: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(NotWritten, match="no room") as caught, new_folder(out) as folder:
        WRITERS[kind](folder / "a")
    assert str(out) in caught.value.cause
    assert not [*small_disk.iterdir()]


def test_export_knows_before_it_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "configure", lambda **_: None)
    home = ["--data-dir", str(tmp_path / "home")]
    for out in impossible(tmp_path):
        assert main(["export", "no-invite", str(out), *home]) == 2
        assert str(out) in capsys.readouterr().err, "the invite is read when something is fetched"
    assert main(["export", "no-invite", str(tmp_path / "out"), *home]) == 2
    assert "SHOAL-221" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
