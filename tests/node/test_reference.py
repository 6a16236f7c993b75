"""docs/metrics.md and docs/errors.md are what the code says today."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from shoal.node import reference
from shoal.node.errors import ConfigError, exit_code
from shoal.node.run.manifest_errors import ManifestTampered
from shoal.protocol.errors import ShoalError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_page_in_docs_is_the_one_the_code_writes(name: str) -> None:
    there = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert there == reference.PAGES[name](), "run: python -m shoal.node.reference docs/"


def test_every_error_has_its_own_code_and_a_meaning() -> None:
    entries = reference.errors()
    assert len(entries) > 15
    assert not [code for code, number in Counter(entry.code for entry in entries).items() if number > 1]
    assert not [entry.name for entry in entries if not entry.meaning.endswith(".")]


def test_the_sources_say_the_same_as_the_classes() -> None:
    """The page is read from the sources; what Python makes of them must agree."""
    by_name = {entry.name: entry for entry in reference.errors()}
    kinds = [ShoalError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in kinds[1:]:
        if "code" in vars(kind):
            assert by_name[kind.__name__].code == kind.code
    assert by_name["ManifestTampered"].fixes
    assert exit_code(ManifestTampered("x")) == 1


def test_no_error_is_there_that_nothing_raises() -> None:
    used: set[str] = set()
    for layer in reference.LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                made = [node.func] if isinstance(node, ast.Call) else []
                made += [node.body, node.orelse] if isinstance(node, ast.IfExp) else []
                used |= {expression.id for expression in made if isinstance(expression, ast.Name)}
                if isinstance(node, ast.ClassDef):  # one that only its kinds are raised of
                    used |= {base.id for base in node.bases if isinstance(base, ast.Name)}
    assert not [entry.name for entry in reference.errors() if entry.name not in used]


def test_the_page_says_which_errors_exit_with_2() -> None:
    kinds = [ConfigError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    said = reference.errors_page().split("exits with 2")[1].split("with 1 for")[0]
    assert set(re.findall(r"SHOAL-\d+", said)) == {kind.code for kind in kinds}
