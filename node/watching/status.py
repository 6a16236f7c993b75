"""Showing a peer's state to people: the status page it serves, and what `shoal status` prints."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...protocol.directory.clocks import MAX_APART_SECONDS
from ..errors import NoPeerHere

if TYPE_CHECKING:
    from rich.console import Group

PAGE_FILE = Path(__file__).with_name("status_page.html")
MAX_STATUS_BYTES = 16 << 20
# What `shoal status` and `shoal runs` show of a status.
SHOWN = frozenset(
    ("run_id", "peer_id", "role", "version", "invite", "phase", "phase_detail", "phase_seconds", "uptime_seconds",
     "step", "steps_total", "steps_done", "history", "loss", "tokens_per_second", "rows_per_second", "slots",
     "slots_total", "outer", "clock_offset_seconds", "last_error", "peers")
)  # fmt: skip
# A peer on this machine or network is asked directly, whatever proxy the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def page() -> tuple[bytes, str]:
    """The status page and the content security policy under which only its own style and script run."""
    text = PAGE_FILE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found is not None, f"the status page has no <{tag}>"
        digest = hashlib.sha256(found[1].encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def fetch_status(
    url: str, *, needed: frozenset[str] = frozenset({"phase"}), timeout_seconds: float = 5.0
) -> dict[str, Any]:
    """`/status.json` of the peer at `url` (with or without that path), in which `needed` are.

    Raises:
        NoPeerHere: nobody answered there, or not with a status.
    """
    if "://" not in url:
        url = f"http://{url}"
    address = url.rstrip("/").removesuffix("/status").removesuffix("/status.json") + "/status.json"
    if not address.startswith(("http://", "https://")):
        raise NoPeerHere(f"{url} is not an HTTP address", fix="write it like http://127.0.0.1:8470")
    try:
        with DIRECT.open(address, timeout=timeout_seconds) as response:
            status = json.loads(response.read(MAX_STATUS_BYTES))
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise NoPeerHere(
            f"nobody answers at {address}: {reason}",
            fix="check that the peer runs and that its --http-host lets you in",
        ) from None
    except (ValueError, http.client.HTTPException):  # the latter: no HTTP, or a port that is no number
        raise NoPeerHere(
            f"{address} did not answer with a status", fix="is this really a Shoal peer's address?"
        ) from None
    if not isinstance(status, dict) or "phase" not in status:
        raise NoPeerHere(f"{address} did not answer with a status", fix="is this really a Shoal peer's address?")
    if missing := sorted(needed - status.keys()):
        raise NoPeerHere(
            f"the status at {address} lacks {', '.join(missing)}", fix="use the version of shoal that this peer has"
        )
    return status


def render(status: dict[str, Any]) -> Group:
    """A status as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    phase = Text(status["phase"], style=_PHASE_STYLE.get(status["phase"], "yellow"))
    if status["phase_detail"]:
        phase.append(f"  {status['phase_detail']}", style="default")
    outer, slots = status["outer"], status["slots"]
    rows: list[tuple[str, str | Text]] = [
        ("run", status["run_id"] or "not known yet"),
        ("peer", f"{status['peer_id']}  {status['role']}, version {status['version']}"),
        ("phase", phase),
        ("up", seconds_text(status["uptime_seconds"])),
        ("step", step_text(status)),
        ("loss", _number(status["loss"], ".4f", " nats a token")),
        ("speed", speed_text(status)),
        ("slots", f"owns {len(slots['owned'])}, stands by for {len(slots['standby'])}, of {status['slots_total']}"),
        ("rounds", ", ".join(f"{n:,.0f} {outcome}" for outcome, n in outer["rounds"].items()) or "none yet"),
    ]
    if outer["last"]:
        last = outer["last"]
        rows.append(
            ("last round", f"{last['outcome']}, {last['members']} members, {seconds_text(last['seconds_ago'])} ago")
        )
    if status["invite"]:
        rows.append(("invite", Text(status["invite"], overflow="fold")))
    if abs(status["clock_offset_seconds"] or 0.0) > MAX_APART_SECONDS:
        rows.append(("clock", Text(f"{status['clock_offset_seconds']:+.0f} s against its peers'", style="bold red")))
    if status["last_error"]:
        error = status["last_error"]
        ago, fix = seconds_text(error["seconds_ago"]), error["fix"] and f" - {error['fix']}"
        rows.append(("last error", Text(f"{ago} ago: {error['cause']}{fix}", style="red")))
    for name, value in rows:
        facts.add_row(name, value if isinstance(value, Text) else Text(value))
    if not status["peers"]:
        return Group(facts)

    peers = Table(title="peers", title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("peer", "role", "phase"):
        peers.add_column(column)
    for column in ("step", "slots", "tokens/s", "loss", "fidelity"):
        peers.add_column(column, justify="right")
    for peer in status["peers"]:
        me = peer["peer_id"] == status["peer_id"]
        peers.add_row(
            Text(f"{peer['peer_id'][-8:]}{' (this)' if me else ''}"),
            Text(peer["role"]),
            Text(peer["phase"], style=_PHASE_STYLE.get(peer["phase"], "yellow")),
            f"{peer['step']:,}",
            str(len(peer["slots"])),
            f"{peer['tokens_per_second']:,.0f}",
            _number(peer["loss"], ".3f"),
            _number(peer["fidelity"], ".2f"),
        )
    return Group(facts, Text(), peers)


def print_invite(invite: str, *, http_url: str, only_this_machine: bool) -> None:
    """Show how others join: framed on a terminal, else the bare invite on a line of its own for scripts to read.

    Args:
        invite: what to pass to `shoal join`.
        http_url: where this peer serves HTTP.
        only_this_machine: the invite's addresses are loopback ones.
    """
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        print(invite, flush=True)
        return
    body = Text.assemble("Anyone joins this run with\n\n  ", (f"shoal join {invite}", "bold green"), "\n")
    if only_this_machine:
        body.append(
            "\nThis address works on this machine only. Start with --announce HOST to be reachable.\n", "yellow"
        )
    body.append(f"\nStatus page: {http_url}/status")
    # The invite must be copied whole: a line that is too long wraps by itself, without a frame in it.
    fits = console.width >= len(invite) + 20
    console.print(Panel(body, title="shoal", expand=False, padding=(1, 2)) if fits else body, soft_wrap=not fits)


_PHASE_STYLE = {"training": "green", "ready": "green", "finished": "green", "failed": "bold red", "stopped": "dim"}


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def step_text(status: dict[str, Any]) -> str:
    """Step of steps, and the time to go at the present speed; where none are taken, those of the furthest composer."""
    step, total = status["step"], status["steps_total"]
    trains = status["role"] in ("composer", "worker")
    if not trains:
        step = max((peer["step"] for peer in status["peers"] if peer["role"] == "composer"), default=0)
    text = f"{step:,} of {total:,} ({step / total:.0%})" if total else f"{step:,}"
    if not trains:
        return text + ", the furthest composer's"
    if not total:
        return text
    history = status["history"]["step"]
    if status["phase"] == "training" and len(history) > 1 and step < total and step > history[0]:
        text += f", {seconds_text((total - step) / steps_per_second(status))} to go"
    return text


def speed_text(status: dict[str, Any]) -> str:
    """What it learns from in a second: a worker sees rows of sketches, everybody else tokens."""
    if status["role"] == "worker":
        return f"{status['rows_per_second']:,.0f} rows/s"
    return f"{status['tokens_per_second']:,.0f} tokens/s"


def steps_per_second(status: dict[str, Any]) -> float:
    """Steps of this process over the time it has been training."""
    seconds = status["phase_seconds"]
    return float(status["steps_done"] / seconds) if seconds > 0 else 0.0


def seconds_text(seconds: float) -> str:
    """ "95 s" as "1 m 35 s": the two largest units."""
    whole = max(0, round(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[:2])
