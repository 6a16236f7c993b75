"""How a machine knows that a peer runs on it: a lock on its data directory and `peer.json`, which says where."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import DataDirUnusable, IdentityInUse, NoPeerHere, PeerDied

PROBED_SECONDS = 0.5  # who only asks if a peer runs holds the lock for microseconds


def make_data_dir(data_dir: Path) -> None:
    """Make it if it is missing, for this user alone.

    Raises:
        DataDirUnusable: that is not possible, or it cannot be written to.
    """
    _lock_file(data_dir).close()


def _lock_file(data_dir: Path) -> IO[str]:
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        return (data_dir / "lock").open("a+")
    except OSError as error:
        where = error.filename or data_dir
        said = "is a file, not a folder" if isinstance(error, FileExistsError) else f"cannot be used: {error.strerror}"
        at = "" if str(where) == str(data_dir) else f", at {where}"
        raise DataDirUnusable(
            f"the data directory {data_dir} {said}{at}", fix="give a --data-dir of your own"
        ) from error


@contextlib.contextmanager
def hold_data_dir(data_dir: Path) -> Iterator[None]:
    """Keep every other peer out of `data_dir` (created if missing) for the duration of the block.

    The kernel drops the lock when the process ends, however it ends.

    Raises:
        IdentityInUse: another process holds it.
        DataDirUnusable: it cannot be made or written to.
    """
    with _lock_file(data_dir) as file:
        deadline = time.monotonic() + PROBED_SECONDS
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise IdentityInUse(
                    f"another peer is running on {data_dir}",
                    fix="stop it, or give this one a directory of its own with --data-dir",
                )
            time.sleep(0.01)
        yield


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(data_dir: Path) -> bool:
    """Whether a process has `data_dir`, in whatever container. Several may ask at once: they share the lock."""
    try:
        with (data_dir / "lock").open() as file:
            return not _lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def announce_here(data_dir: Path, url: str) -> Iterator[None]:
    """Say in `peer.json` where this process' HTTP server is, for `shoal status`; take it back at the end."""
    path = data_dir / "peer.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n")
    temporary.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find_peer(data_dir: Path) -> str:
    """The URL of the peer that runs on `data_dir`.

    The lock decides, not the process id in `peer.json`: by now that may be another process, or one of a container.

    Raises:
        PeerDied: one did, and could not take its `peer.json` back.
        NoPeerHere: none does, or that is not ours to know.
    """
    path = data_dir / "peer.json"
    try:
        said = json.loads(path.read_text())
        url, pid = str(said["url"]), int(said["pid"])
        held = _is_held(data_dir)
    except PermissionError as error:
        raise NoPeerHere(
            f"cannot look into {error.filename}: {error.strerror}",
            fix="ask as the user that the peer runs as, or name its URL",
        ) from None
    except OSError:  # there is none, or `data_dir` is no folder
        raise NoPeerHere(f"no peer runs on {data_dir}", fix="start one, or name its --data-dir or its URL") from None
    except (ValueError, KeyError, TypeError) as error:
        raise NoPeerHere(f"{path} is damaged: {error}", fix="delete it and start the peer again") from None
    if not held:
        raise PeerDied(
            f"the peer that ran on {data_dir} (process {pid}) has died", fix="start it again; it resumes by itself"
        )
    return url
