"""Outcomes that are there already: one JSON line each, written as soon as it is known, so that a bench can go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .results import Result


@dataclass(frozen=True)
class Cell:
    """One method's outcome with one seed, and its training loss after every step."""

    result: Result
    curve: Sequence[float]


class Cells:
    """By `Comparison.key`. Keys name facts, not code: a file that an earlier version wrote is not to be gone on with.

    Args:
        path: where they lie; None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._cells: dict[str, Cell] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, _, torn = (path.read_text() if path.exists() else "").rpartition("\n")
        for line in whole.splitlines():
            told = json.loads(line)
            self._cells[told["key"]] = Cell(Result(**told["result"]), told["curve"])
        if torn:  # written by a process that was killed meanwhile
            path.write_text(whole + "\n" if whole else "")

    def get(self, key: str) -> Cell | None:
        """None if it is still to be found out."""
        return self._cells.get(key)

    def put(self, key: str, cell: Cell) -> Cell:
        """Keep it, in the file too."""
        self._cells[key] = cell
        if self._path is not None:
            with self._path.open("a") as file:
                told = {"key": key, "result": asdict(cell.result), "curve": [round(loss, 5) for loss in cell.curve]}
                file.write(json.dumps(told) + "\n")
        return cell
