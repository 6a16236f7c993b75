"""`shoal runs`: what can be joined at an address, as the peers that run there show it."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import NoPeerHere
from ..watching.status import SHOWN, fetch_status


@dataclass(frozen=True)
class RunSeen:
    """A run as one of its peers shows it."""

    run_id: str
    at: str  # whom was asked
    phase: str  # of that peer
    composers: int
    workers: int
    step: int  # of the composer that is furthest
    steps_total: int
    loss: float | None  # median of the composers', nats a token
    invite: str


def runs(
    *,
    bootstrap: Annotated[tuple[str, ...], Parameter(metavar="ADDR...", negative=())],
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """List the runs that can be joined at these addresses.

    It asks peers for their status over HTTP, so it shows runs of peers whose `--http-host` lets others in; a bootstrap
    peer of a public run has `--http-host 0.0.0.0`. Whoever can answer in a peer's place chooses the run: compare the
    run id with what its founder has published.

        shoal runs --bootstrap train.example.org:8470
        shoal runs --bootstrap 198.51.100.7:8470 --bootstrap 198.51.100.8:8470 --json

    Parameters
    ----------
    bootstrap:
        HOST:PORT or URL of a peer's status page; may be given several times.
    json:
        Print them as JSON.
    """
    seen, silent = look(bootstrap)
    if json:
        print(jsonlib.dumps([asdict(run) for run in seen], indent=2))
    else:
        _show(seen)
    for error in silent:
        print(f"shoal: {error}", file=sys.stderr)
    return int(not seen)


def look(addresses: Sequence[str]) -> tuple[list[RunSeen], list[NoPeerHere]]:
    """Ask all at once. Of a run that several show, the first; and why the others could not be asked."""
    if not addresses:
        raise NoPeerHere("no address to ask at", fix="name one: --bootstrap HOST:PORT")
    with ThreadPoolExecutor(min(16, len(addresses))) as pool:
        answers = list(pool.map(_ask, addresses))
    seen: dict[str, RunSeen] = {}
    for answer in answers:
        if isinstance(answer, RunSeen):
            seen.setdefault(answer.run_id, answer)
    return list(seen.values()), [answer for answer in answers if isinstance(answer, NoPeerHere)]


def _ask(address: str) -> RunSeen | NoPeerHere:
    try:
        return _seen(address, fetch_status(address, needed=SHOWN))
    except NoPeerHere as error:
        return error


def _seen(address: str, status: dict[str, Any]) -> RunSeen:
    if not status["run_id"] or not status["invite"]:
        raise NoPeerHere(
            f"the peer at {address} is {status['phase']}: it is in no run yet", fix="try again in a minute"
        )
    composers = [peer for peer in status["peers"] if peer["role"] == "composer"]
    losses = sorted(peer["loss"] for peer in composers if peer["loss"] is not None)
    return RunSeen(
        run_id=status["run_id"],
        at=address,
        phase=status["phase"],
        composers=len(composers),
        workers=sum(peer["role"] == "worker" for peer in status["peers"]),
        step=max((peer["step"] for peer in composers), default=0),
        steps_total=status["steps_total"],
        loss=losses[(len(losses) - 1) // 2] if losses else None,
        invite=status["invite"],
    )


def _show(seen: Sequence[RunSeen]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("run", "composers", "workers", "step", "loss, nats a token"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in seen:
        step = f"{run.step:,}" + (f" of {run.steps_total:,}" if run.steps_total else "")
        loss = "-" if run.loss is None else f"{run.loss:.3f}"
        table.add_row(run.run_id, str(run.composers), str(run.workers), step, loss)
    if seen:
        console.print(table)
    for run in seen:  # an IPv6 address in brackets is no markup
        console.print(f"\nshoal join {run.invite}", soft_wrap=True, highlight=False, markup=False)
