"""A CPU of its own for each peer: a share of a core that the others neither take nor give, through Linux' cgroups.

Without that, peers on one machine get the share of those that died, and goodput looks better than on machines of their
own. While a peer starts it has no bound: what counts is training, and a machine of its own would start it as fast.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from types import TracebackType

PERIOD_US = 20_000  # short, so that a peer out of its share stands still for less than a network's round trip
EMPTY_SECONDS = 5.0
VERSION_1, VERSION_2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


class QuotaMissing(Exception):
    """This machine cannot bound CPU time; the message says what it lacks."""


class Quotas:
    """A context manager: leaving it removes the groups, whose processes must have ended.

    Args:
        cores: that each peer may use once it trains; below 1 a part of one.
    """

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self._mark = f"shoal-{secrets.token_hex(3)}"
        self._old = (VERSION_1 / "cpu.cfs_quota_us").exists() or (VERSION_1 / "cgroup.procs").exists()
        self._root = VERSION_1 if self._old else VERSION_2
        self._bounded: dict[str, bool] = {}

    def __enter__(self) -> Quotas:
        try:
            if not self._old:
                (self._root / "cgroup.subtree_control").write_text("+cpu")
            self._group("probe").mkdir()
            self.bound("probe", True)
            self._group("probe").rmdir()
        except OSError as error:
            raise QuotaMissing(f"no cgroups with CPU quotas to write to: {error}") from None
        self._bounded.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._bounded:
            self._remove(self._group(name))

    def command(self, name: str, command: list[str]) -> list[str]:
        """`command`, to be run in the group of peer `name`, without a bound; it keeps the process id."""
        self._group(name).mkdir(exist_ok=True)
        self.bound(name, False)
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._group(name) / "cgroup.procs"), *command]

    def bound(self, name: str, bounded: bool) -> None:
        """Let peer `name` use its share only, or all it can get."""
        if self._bounded.get(name) == bounded:
            return
        quota = int(self.cores * PERIOD_US) if bounded else -1
        if self._old:
            (self._group(name) / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._group(name) / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self._group(name) / "cpu.max").write_text(f"{quota if bounded else 'max'} {PERIOD_US}")
        self._bounded[name] = bounded

    def _group(self, name: str) -> Path:
        return self._root / f"{self._mark}-{name}"

    @staticmethod
    def _remove(group: Path) -> None:
        """What was killed leaves its group a moment later."""
        deadline = time.monotonic() + EMPTY_SECONDS
        while group.exists():
            try:
                group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
