"""Errors of the process itself. Like every `ShoalError`, each carries a code, a cause and what the user can do.

    ShoalError
    ├── ConfigError         what this peer was told makes no sense
    │   ├── InviteError     an invite cannot be read
    │   └── DataDirUnusable the data directory cannot be made or written to
    ├── RunNotFound         nobody at the invite's addresses knows its run
    ├── IdentityInUse       another process uses this data directory, and so this peer's identity
    ├── NoIdentity          no identity file exists yet
    └── NoPeerHere          no running peer could be asked
        └── PeerDied        one ran here, and ended without saying so

Errors of one module only live there: `data.DataError`, `checkpoint.CheckpointError`, `manifest.ManifestError`,
`gather.ExportFailed`. docs/errors.md lists all of them; `reference.py` writes it.
`exit_code` says how a command ends: 2 when the command line or configuration must change, else 1.
"""

from __future__ import annotations

from ..protocol.errors import ShoalError


class ConfigError(ShoalError):
    """A flag, an environment variable or the settings file has a value that makes no sense."""

    code = "SHOAL-220"


class InviteError(ConfigError):
    """The invite cannot be read: it is cut off, misspelled, or for another protocol version."""

    code = "SHOAL-221"


class DataDirUnusable(ConfigError):
    """The data directory is no folder, cannot be made, or is not this user's to write to."""

    code = "SHOAL-228"


class RunNotFound(ShoalError):
    """Nobody at the invite's addresses knows its run, or there was neither an invite nor a run to found."""

    code = "SHOAL-222"


class IdentityInUse(ShoalError):
    """Another peer uses this data directory, or a copy of it, and so this peer's identity."""

    code = "SHOAL-225"


class NoIdentity(ShoalError):
    """The data directory holds no identity yet."""

    code = "SHOAL-226"


class NoPeerHere(ShoalError):
    """No running peer could be asked for its status."""

    code = "SHOAL-227"


class PeerDied(NoPeerHere):
    """A peer ran on this data directory and ended without saying so."""


def exit_code(error: ShoalError) -> int:
    """What a command that ended with `error` exits with."""
    return 2 if isinstance(error, ConfigError) else 1
