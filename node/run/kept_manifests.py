"""Signed manifests in a data directory: `manifest-<run id>.signed`, one of each run that its peer was in.

By it a founder goes on with its run. So each run has its own: one that the directory founds or joins later must not
take the place of another, whose invites would lead nowhere then.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from ..logs import get_logger
from ..storage.whole_file import write_whole
from .manifest import Manifest, Run, read_signed
from .manifest_errors import ManifestError, ProtocolMismatch, UnknownFields

log = get_logger(__name__)

ONE_FOR_ALL = "manifest.signed"  # what earlier versions wrote: the manifest of the last run
_PREFIX, _SUFFIX = "manifest-", ".signed"
_DIGEST = "[0-9a-f]" * 12  # the end of a run id


def manifest_file(data_dir: Path, run_id: str) -> Path:
    """Where the signed manifest of a run is kept."""
    return data_dir / f"{_PREFIX}{run_id}{_SUFFIX}"


def keep_manifest(data_dir: Path, run_id: str, signed: bytes) -> None:
    """Keep the signed manifest of a run. Raises OSError; one that was kept before is untouched then."""
    path = manifest_file(data_dir, run_id)
    with contextlib.suppress(OSError):
        if path.read_bytes() == signed:
            return
    write_whole(path, signed)


def asked_otherwise(known: Manifest, asked: Manifest) -> list[str]:
    """Facts like `train.steps` that a founder asks for and that its run of before has otherwise."""
    before, now = (msgspec.to_builtins(msgspec.structs.replace(each, created_at=0)) for each in (known, asked))
    return [
        f"{part}.{name}"
        for part, facts in now.items()
        if isinstance(facts, dict)
        for name, value in facts.items()
        if before[part][name] != value
    ]


def founded_before(data_dir: Path, founder: str, name: str) -> Run | None:
    """The newest run of that name that the peer `founder` founded on this directory.

    Raises:
        ManifestError: there is none, and a file that may have been of it cannot be read.
    """
    found: list[Run] = []
    unreadable: list[tuple[Path, OSError | ManifestError]] = []
    for path in [*sorted(data_dir.glob(f"{_PREFIX}{name}-{_DIGEST}{_SUFFIX}")), data_dir / ONE_FOR_ALL]:
        run_id = None if path.name == ONE_FOR_ALL else path.name[len(_PREFIX) : -len(_SUFFIX)]
        try:
            known = read_signed(path.read_bytes(), run_id)
        except FileNotFoundError:
            continue
        except (OSError, ManifestError) as error:
            log.warning("manifest.skipped", path=str(path), error=str(error))
            unreadable.append((path, error))
            continue
        if known.manifest.founder == founder and known.manifest.name == name:
            found.append(known)
    if found:
        return max(found, key=lambda kept: kept.manifest.created_at)
    if unreadable:
        path, why = unreadable[0]
        if isinstance(why, ProtocolMismatch | UnknownFields):
            raise why  # nothing is wrong with the file
        cause = why.cause if isinstance(why, ManifestError) else str(why.strerror)
        raise ManifestError(
            f"{path} cannot be read, and may be of the run to go on with: {cause}",
            fix="join the run with this data directory once, which fetches it again, or delete it to found a new run",
        ) from why
    return None
