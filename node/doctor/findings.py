"""What a check found, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ...protocol.errors import ShoalError

if TYPE_CHECKING:
    from rich.table import Table


class Verdict(StrEnum):
    """`warn` works, and not as well as it could; with `fail` a peer does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    check: str
    verdict: Verdict
    said: str
    fix: str = ""

    @classmethod
    def of(cls, check: str, error: ShoalError) -> Finding:
        """A failure, by the error that a peer would end with."""
        return cls(check, Verdict.FAIL, error.cause, error.fix)


def ok(check: str, said: str) -> Finding:
    return Finding(check, Verdict.OK, said)


def warn(check: str, said: str, fix: str) -> Finding:
    return Finding(check, Verdict.WARN, said, fix)


def fail(check: str, said: str, fix: str) -> Finding:
    return Finding(check, Verdict.FAIL, said, fix)


_STYLE = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def table(findings: Sequence[Finding]) -> Table:
    """For a terminal; verdicts are words, so that colour alone says nothing."""
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("check", "", "what was found, and what to do"):
        rows.add_column(column)
    for each in findings:
        said = Text(each.said)
        if each.fix:
            said.append(f"\n-> {each.fix}", "dim" if each.verdict is Verdict.OK else "")
        rows.add_row(each.check, Text(each.verdict.value, _STYLE[each.verdict]), said)
    return rows
