"""A folder that a command makes for its user: whole or not there, and refused before the work rather than after it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ...protocol.errors import ShoalError
from ..errors import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class NotWritten(ShoalError):
    """There was no room for what a command was to write; nothing of it is left."""

    code = "SHOAL-234"


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` when the block ends, and is removed if the block fails.

    Raises:
        ConfigError: at once; `out` is there already, or cannot be made.
        NotWritten: there is no room for what the block writes.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already", fix="name a folder that does not")
    partial = out.with_name(f"{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}", fix="name a folder where you may write") from error
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # as the umask has it; safetensors writes for the own user alone
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as text
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
            raise NotWritten(f"no room for {out}: {error}", fix="free disk space, or name another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed by now, unless something failed
