"""The benchmark of starts: what it times is what real processes do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from rich.console import Console
from shoal.benchmarks.start import KINDS, NOTHING_YET, Imports, Start, help_seconds, imports, markdown, starts

HELP_SECONDS = 3.0  # what anybody may wait for help, on a machine that does nothing else


def test_help_comes_soon_and_kinds_of_processes_import_what_they_need() -> None:
    assert 0.0 < help_seconds(3) < 2 * HELP_SECONDS
    told = {kind: imports(kind, 1) for kind in ("composer", "worker", "transport", "torch alone")}
    assert told.keys() <= KINDS.keys()
    assert all(found.cpu_seconds > 0.1 for found in told.values())
    least, composer = told["torch alone"], told["composer"]
    assert composer.modules > told["worker"].modules > least.modules, "workers build no model of transformers'"
    assert composer.resident_bytes > least.resident_bytes > 1 << 26
    assert told["transport"].resident_bytes < least.resident_bytes, "it has no torch"


@pytest.mark.timeout(300)
def test_every_second_of_a_start_has_a_name(tmp_path: Path) -> None:
    founder, composer, worker = starts("tiny", tmp_path, Console(stderr=True))
    assert [start.role for start in (founder, composer, worker)] == [
        "found, bootstrap",
        "join, composer",
        "join, worker",
    ]
    for start in (founder, composer, worker):
        assert start.parts[NOTHING_YET] > 0.1
        assert {"joining: starting the directory", "joining: starting the transport"} <= start.parts.keys()
        assert start.cpu_seconds > 1.0
    assert "syncing: building the model" in composer.parts
    assert "syncing: building the model" not in worker.parts


def test_the_table_adds_up() -> None:
    parts = {"a": random.uniform(1, 2), "b": random.uniform(1, 2)}
    started = [Start("one", parts, 3.0), Start("two", {"b": parts["b"], "c": 1.0}, 4.0)]
    text = markdown(0.5, [Imports("torch", 1.25, 1.5, 200_000_000, 1234)], started)
    assert "| torch | 1.25 | 1.50 | 200 | 1,234 |" in text
    assert f"| b | {parts['b']:.2f} | {parts['b']:.2f} |" in text
    assert f"| **ready after** | {sum(parts.values()):.2f} | {parts['b'] + 1:.2f} |" in text
    assert "| a | " in text
    assert text.count("|  |") == 2, "what did not happen is empty"
