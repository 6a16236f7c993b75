"""Files that are whole or not there, whatever kills the process or fills the disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Put `data` in `path`; when this returns it survives a crash of the machine. One process writes a path at a time.

    `mode` is the file's, less the umask. Raises OSError, which names `path`; what was there before is still there then.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Have a file, or what a directory lists, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
