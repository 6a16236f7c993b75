"""Local state on disk: complete or not there, whatever kills the process.

A checkpoint is a directory `<serial>-step-<step>` with `state.safetensors` and `meta.json`, which holds the SHA-256
of the former and of itself. It is written as `.partial`, every file and then the directory synced, renamed, and the
parent synced; only then does `save` return. Serials count saves, so saving a step again (after a resume) never
replaces anything and the newest is the one saved last. One process writes to a folder; any number may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...protocol.errors import ShoalError
from .whole_file import sync as _sync

log = logging.getLogger(__name__)

FORMAT = 1
DIRECTORY = re.compile(r"(\d{10})-step-(\d{10,})")
TENSORS, META, PARTIAL = "state.safetensors", "meta.json", ".partial"
RESERVE_BYTES = 1 << 20  # for metadata and the file system's own, on top of the tensors


class CheckpointError(ShoalError):
    """A checkpoint could not be written. Those written before are untouched."""

    code = "SHOAL-232"


class DiskFull(CheckpointError):
    """No room for a checkpoint. Those written before are untouched, and training may go on."""

    code = "SHOAL-233"


@dataclass(frozen=True)
class Checkpoint:
    """What was found on disk."""

    step: int
    tensors: dict[str, torch.Tensor]  # on the CPU
    meta: dict[str, Any]
    path: Path


class CheckpointStore:
    """Checkpoints in one folder, the newest `keep` of them.

    Args:
        folder: made if it does not exist.
        keep: how many complete ones stay on disk, at least 1. Saving needs room for one more.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
        """Writes a checkpoint; when this returns it survives a crash of the machine. Then removes those beyond `keep`.

        Raises DiskFull or CheckpointError, with nothing lost but this attempt. Tensors that share memory (tied
        weights) are written once each. `meta` must be JSON.
        """
        stored = _separate(tensors)
        partial = self.folder / PARTIAL
        with self._mapped_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed
            needed = sum(t.nbytes for t in stored.values()) + RESERVE_BYTES
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, f"{needed} bytes needed")
            serial = max((s for s, _ in self._found()), default=0) + 1
            final = self.folder / f"{serial:010d}-step-{step:010d}"
            try:
                partial.mkdir()
                save_file(stored, partial / TENSORS)
                _sync(partial / TENSORS)
                body = {"format": FORMAT, "step": step, "sha256": _sha256(partial / TENSORS), "meta": dict(meta)}
                with (partial / META).open("w") as file:
                    json.dump({**body, "self": _self_digest(body)}, file)
                _sync(partial / META)
                _sync(partial)
                partial.rename(final)
                _sync(self.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # gone already unless something failed
        for _, path in self._found()[self.keep :]:
            shutil.rmtree(path, ignore_errors=True)  # one that stays is removed next time
        return final

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint or None."""
        return next(self.newest(), None)

    def newest(self) -> Iterator[Checkpoint]:
        """Complete checkpoints, the newest first, each read when asked for.

        Damaged ones are skipped, each with a logged reason.
        """
        for _, path in self._found():
            try:
                found = _load(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("checkpoint skipped path=%s reason=%s", path, error)
                continue
            yield found

    def _found(self) -> list[tuple[int, Path]]:
        """Directories that look like checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        matches = ((DIRECTORY.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            # safetensors reports a full disk as text
            full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if full:
                raise DiskFull(
                    f"no room for a checkpoint in {self.folder}: {error}",
                    fix="free disk space or move the state directory; earlier checkpoints are intact",
                ) from error
            raise CheckpointError(
                f"cannot write a checkpoint to {self.folder}: {error}",
                fix="make the state directory writable; earlier checkpoints are intact",
            ) from error


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share memory: safetensors refuses those that do."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return stored


def _load(path: Path) -> Checkpoint:
    meta = json.loads((path / META).read_text())
    if meta.pop("self") != _self_digest(meta):
        raise ValueError(f"{META} does not match its digest")
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
    if _sha256(path / TENSORS) != meta["sha256"]:
        raise ValueError(f"{TENSORS} does not match its digest")
    # load_file maps the file into memory: the copies outlive its removal and give its disk space back
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    return Checkpoint(meta["step"], tensors, meta["meta"], path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
