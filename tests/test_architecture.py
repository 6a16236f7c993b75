"""The shape of the code base: which layer may import which, and how long a file may be."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "protocol", "node", "benchmarks")  # each may import itself and what stands to its left
MAY_NOT_IMPORT = {
    "kernels": {"hivemind", "libp2p", "transformers", "msgspec", "trio"},
    "protocol": {"transformers", "bitsandbytes", "prometheus_client", "cyclopts"},
}
MAX_LINES = 400


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(`layer` or third-party top-level name, line) of every import in a file, function-local ones too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.removeprefix("shoal.").split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                target = (*base, *(node.module or "").split("."))
                names = [target[0]] if target[0] else [alias.name for alias in node.names]
                for name in names:
                    yield name, node.lineno
            elif node.module:
                yield node.module.removeprefix("shoal.").split(".")[0], node.lineno


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_point_one_way(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | MAY_NOT_IMPORT.get(layer, set())
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(layer)
        for name, line in imported(path)
        if name in above
    ]
    assert not wrong, "\n".join(wrong)


def test_an_installed_package_is_complete() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).parts for layer in LAYERS for path in sources(layer)}
    assert sorted(listed) == sorted(".".join(("shoal", *parts)) for parts in {(), *folders})


def test_the_import_rule_sees_relative_imports() -> None:
    seen = {name for name, _ in imported(ROOT / "node" / "learning" / "composer.py")}
    assert {"kernels", "protocol", "node"} <= seen


def test_hivemind_and_libp2p_never_meet_in_one_file() -> None:
    """Both register the protobuf package crypto.pb: the second import in a process fails."""
    for path in [path for layer in LAYERS for path in sources(layer)]:
        names = {name for name, _ in imported(path)}
        assert not {"hivemind", "libp2p"} <= names, path


@pytest.mark.parametrize("layer", [*LAYERS, "tests"])
def test_one_file_one_concept(layer: str) -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources(layer) if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_numpy_is_below_what_breaks_hivemind() -> None:
    """numpy 2.4 turns hivemind's 8-bit averaging into a silent no-op; the pin must be in the metadata too."""
    major, minor = map(int, numpy.__version__.split(".")[:2])
    assert (major, minor) < (2, 4)
    pins = [r for r in requires("shoal") or [] if re.match(r"numpy\b", r)]
    assert pins
    assert all("<2.4" in pin for pin in pins)
