"""What a bench found out is there when it is started again."""

from __future__ import annotations

import json
import random
from pathlib import Path

from shoal.benchmarks.cells import Cell, Cells
from shoal.benchmarks.results import Result


def cell() -> Cell:
    up = {"rounds": random.randrange(1000)}
    curve = [round(random.uniform(1.0, 5.0), 5) for _ in range(7)]
    return Cell(Result("lone", random.random(), 3.0, seed=2, up=up, blocked_share=random.random()), curve)


def test_cells_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "cells.jsonl"
    first, second = cell(), cell()
    cells = Cells(path)
    cells.put("a", first)
    cells.put("b", second)
    again = Cells(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (first, second, None)


def test_a_line_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    kept, lost = cell(), cell()
    cells = Cells(path)
    cells.put("a", kept)
    cells.put("b", lost)
    text = path.read_text()
    path.write_text(text[: random.randrange(text.index("\n") + 2, len(text))])
    again = Cells(path)
    assert (again.get("a"), again.get("b")) == (kept, None)
    again.put("c", lost)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_without_a_path_nothing_is_written() -> None:
    cells = Cells(None)
    assert cells.put("a", cell()) == cells.get("a")
