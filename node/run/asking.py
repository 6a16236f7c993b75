"""Invites by asking: the HTTP address of a peer in place of an invite, in a network that one trusts.

Whoever can answer in that peer's place chooses the run. What was answered is kept in `invites.json` in the data
directory, by address: a peer that starts while the other one is down comes back into the run by it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ...protocol.errors import ShoalError
from ..errors import NoPeerHere
from ..logs import get_logger
from ..storage.whole_file import write_whole
from ..watching.status import fetch_status
from .invite import Invite

log = get_logger(__name__)

ASK_AGAIN_SECONDS = 1.0


def invite_of(
    told: str, *, keep_in: Path | None = None, seconds: float = 0.0, beat: Callable[[], None] = lambda: None
) -> Invite:
    """The invite that `told` is, or that the peer at that HTTP address shows.

    Args:
        keep_in: the data directory.
        seconds: how long to ask an address that never answered before.
        beat: called before every time that it is asked.

    Raises:
        InviteError: it is none.
        NoPeerHere: nobody answered there, or the peer has none yet.
    """
    if not told.startswith(("http://", "https://")):
        return Invite.parse(told)
    deadline, reason = time.monotonic() + seconds, ""
    while True:
        beat()
        try:
            invite = Invite.parse(_ask(told))
        except NoPeerHere as error:
            if (kept := _kept(keep_in).get(told)) is not None:
                log.warning("invite.kept", run_id=kept.run_id, error=error.cause)
                return kept
            if time.monotonic() >= deadline:
                raise
            if error.cause != reason:
                log.warning("invite.no_answer", error=error.cause)
            reason = error.cause
            time.sleep(ASK_AGAIN_SECONDS)
        else:
            _keep(keep_in, told, invite)
            return invite


def _ask(url: str) -> str:
    invite = str(fetch_status(url).get("invite", ""))
    if not invite:
        raise NoPeerHere(f"the peer at {url} shows no invite yet", fix="wait until it is in the run, and try again")
    return invite


def _kept(folder: Path | None) -> dict[str, Invite]:
    """What can be read of it, by address."""
    if folder is None:
        return {}
    try:
        told = json.loads((folder / "invites.json").read_text())
        return {str(url): Invite.parse(text) for url, text in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, ShoalError) as error:
        log.warning("invite.not_read", folder=str(folder), error=str(error))
        return {}


def _keep(folder: Path | None, url: str, invite: Invite) -> None:
    """The latest only: a peer is told one address."""
    kept = _kept(folder)
    if folder is None or kept == {url: invite}:
        return
    if url in kept and kept[url].run_id != invite.run_id:  # as when that peer has lost its volume
        log.warning("invite.other_run", run_id=invite.run_id, before=kept[url].run_id)
    try:
        write_whole(folder / "invites.json", json.dumps({url: str(invite)}).encode(), mode=0o600)
    except OSError as error:
        log.warning("invite.not_written", error=str(error))
