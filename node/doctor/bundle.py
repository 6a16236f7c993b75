"""A support archive: what somebody else needs to help, and nothing that they must not have.

In it are findings, versions, settings, the running peer's status and the end of a log. Left out are keys, text, and
invites, which let whoever holds them in; the peer's name for itself and others' peer ids stay, or nothing would make
sense. Whatever goes in is searched for the files that hold secrets before anything is written.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..config import PeerConfig
from ..errors import ConfigError, NoPeerHere
from ..storage.presence import find_peer
from ..watching.status import fetch_status
from .findings import Finding

LOG_BYTES = 1 << 20  # of the log's end
SECRET_FILES = ("*.key",)
_INVITE = re.compile(r"shoal://[^\s\"']+?/(?P<run>[a-z0-9-]+-[0-9a-f]{12})[^\s\"']*")
_README = """Written by `shoal doctor --bundle`.

findings.json   every check's verdict
settings.json   flags, environment and file, together; paths begin with ~ where they lie in the home folder
status.json     what the running peer says of itself and the swarm; missing if none runs
log.txt         the end of the log, if one was named

Keys, invites and text are not in here.
"""


def write_bundle(out: Path, config: PeerConfig, findings: Sequence[Finding], log: Path | None) -> list[str]:
    """Write a .tar.gz. Returns the names in it.

    Raises:
        ConfigError: `out` is there already or cannot be written, the log cannot be read, or a secret would get in.
    """
    parts = {
        "README.txt": _README,
        "findings.json": _json([asdict(finding) for finding in findings]),
        "settings.json": _json(_settings(config)),
    }
    try:
        told = fetch_status(find_peer(config.data_dir))
    except NoPeerHere:
        pass
    else:
        parts["status.json"] = _json(told)
    if log is not None:
        parts["log.txt"] = _tail(log)
    blanked = {name: _without_home(_without_invites(text)) for name, text in parts.items()}
    _refuse_secrets(blanked, config.data_dir)
    try:
        with tarfile.open(out, "x:gz") as archive:
            for name, text in blanked.items():
                data = text.encode()
                entry = tarfile.TarInfo(f"shoal-support/{name}")
                entry.size, entry.mtime = len(data), int(time.time())
                archive.addfile(entry, io.BytesIO(data))
    except FileExistsError:
        raise ConfigError(f"{out} exists already", fix="name a file that does not") from None
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}", fix="name a file in a folder of yours") from None
    return list(blanked)


def _settings(config: PeerConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(config)}


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            return file.read(LOG_BYTES).decode(errors="replace")
    except OSError as error:
        raise ConfigError(
            f"cannot read the log {log}: {error.strerror}", fix="name the file that the log is in"
        ) from None


def _without_home(text: str) -> str:
    home = os.path.expanduser("~")  # "~" itself where the user has none, "/" in some containers
    return text if home in ("", "/") else text.replace(home, "~")


def _without_invites(text: str) -> str:
    return _INVITE.sub(r"<invite to \g<run>>", text)


def _refuse_secrets(parts: Mapping[str, str], data_dir: Path) -> None:
    """A key may have got into a log: no part may hold a secret file's bytes, as they are or as hex."""
    secrets = {path.name: path.read_bytes() for kind in SECRET_FILES for path in data_dir.glob(kind)}
    for name, text in parts.items():
        for file, secret in secrets.items():
            forms = (secret.decode("latin-1"), secret.hex(), secret.hex().upper())
            if any(form and form in text for form in forms):
                raise ConfigError(
                    f"{name} holds what is in {file}", fix="take it out of there; and make a new key, that one is known"
                )


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"
