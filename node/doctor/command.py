"""`shoal doctor`, as the command line calls it."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from .. import logs
from ..config import PeerConfig
from .findings import Finding, Verdict

REPORT = Group("Report", sort_key=0)


def doctor(
    invite: Annotated[str | None, Parameter(group=REPORT)] = None,
    *,
    json: Annotated[bool, Parameter(group=REPORT, negative=())] = False,
    bundle: Annotated[Path | None, Parameter(group=REPORT)] = None,
    log: Annotated[Path | None, Parameter(group=REPORT)] = None,
    peer: Annotated[PeerConfig | None, Parameter(name="*")] = None,
) -> int:
    """Look for what would keep a peer from working here, and say what to do about it.

    Give it the settings that the peer has or will have: flags, environment or file, as for `join`. With an invite it
    also asks the run: do its peers answer, can they dial this machine, do the clocks agree, how fast is it. It joins as
    a visitor with a key of its own, and leaves nothing behind there. The exit code is 1 if a check failed.

        shoal doctor
        shoal doctor INVITE --dht-port 31337 --transport-port 31338
        shoal doctor INVITE --bundle support.tar.gz --log peer.log

    Parameters
    ----------
    invite:
        The run that this machine is to join.
    json:
        Print the findings as JSON.
    bundle:
        Also write an archive to show to somebody who helps: findings, versions, settings, the running peer's status.
        Neither keys nor invites are in it.
    log:
        The end of this file goes into the bundle too: the peer's log, wherever that is kept.
    """
    from .machine import machine_checks
    from .network import network_checks

    config = replace(peer or PeerConfig(), invite=invite)
    logs.configure(format=config.log_format, level="error")
    findings: list[Finding] = list(machine_checks(config))
    if invite is not None:
        findings += network_checks(config, invite)
    if json:
        print(jsonlib.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.console import Console

        from .findings import table

        Console().print(table(findings))
    if bundle is not None:
        from .bundle import write_bundle

        names = write_bundle(bundle.expanduser(), config, findings, log and log.expanduser())
        if not json:
            print(f"\n{bundle}: {', '.join(names)}")
    return int(any(finding.verdict is Verdict.FAIL for finding in findings))
