"""The pages of docs/ that the code writes itself: `python -m shoal.node.reference docs/`.

    docs/metrics.md   the list in metrics.py
    docs/errors.md    read from the sources, not by importing them: hivemind and libp2p cannot share a process

An error's meaning is the first paragraph of its docstring, else its line in the tree that its module's docstring draws.
What to do is every `fix=` that it is raised with; `...` stands for what is filled in at run time. A class without a
code of its own is a kind of the error it derives from, and has no row.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .watching.metrics import reference as metrics_table

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("protocol", "node")
NOTICE = "<!-- Written by `python -m shoal.node.reference docs/`. Do not edit. -->"


@dataclass
class ErrorEntry:
    """One class with an error code."""

    name: str
    where: str  # file, relative to the root
    code: str
    meaning: str
    fixes: list[str] = field(default_factory=list)


@dataclass
class _Source:
    path: Path
    tree: ast.Module
    texts: dict[str, str]  # constants of the module that hold text


@functools.cache
def errors() -> tuple[ErrorEntry, ...]:
    """Every ShoalError with a code of its own, in order of the codes."""
    sources = [_read(path) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    classes = {
        node.name: (node, source)
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    }
    entries = {}
    for name, (node, source) in classes.items():
        code = _code(node)
        if code and _is_error(name, classes):
            entries[name] = ErrorEntry(name, source.path.relative_to(ROOT).as_posix(), code, _meaning(node, source))
    owner = {name: _with_code(name, classes, entries) for name in classes if _is_error(name, classes)}
    for source in sources:
        for name, fix in _fixes(source):
            entry = entries.get(owner.get(name) or "")
            if entry is not None and fix not in entry.fixes:
                entry.fixes.append(fix)
    return tuple(sorted(entries.values(), key=lambda entry: entry.code))


ERRORS_HEAD = f"""{NOTICE}

# Errors

An error that you can do something about is printed as one line of cause, with its code in brackets, and one line with
the fix. `/status.json` shows the last one of a running peer as `last_error`. A command exits with 2 when the command
line or the settings must change (`SHOAL-220`, `SHOAL-221`, `SHOAL-228`), and with 1 for everything else here.

The last column lists the fixes that are named where the error is raised; `...` stands for a value that is filled in.
Checks of single settings name the values that are possible.

| code | class | defined in | what it means | what to do |
|---|---|---|---|---|
"""

METRICS_HEAD = f"""{NOTICE}

# Metrics

What every peer shows at `/metrics`, in the Prometheus text format, besides the usual `process_*` ones. A value that is
not known yet is absent, not zero. Counters belong to the process: they start at zero after a restart.

"""


def errors_page() -> str:
    """docs/errors.md."""
    rows = [
        f"| `{entry.code}` | `{entry.name}` | `{entry.where}` | {_cell(entry.meaning)} | "
        f"{'<br>'.join(map(_cell, sorted(entry.fixes)))} |\n"
        for entry in errors()
    ]
    return ERRORS_HEAD + "".join(rows)


def metrics_page() -> str:
    """docs/metrics.md."""
    return METRICS_HEAD + metrics_table()


PAGES = {"errors.md": errors_page, "metrics.md": metrics_page}


def _read(path: Path) -> _Source:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in tree.body:  # texts made of other texts
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.JoinedStr)
            and isinstance(node.targets[0], ast.Name)
        ):
            texts[node.targets[0].id] = next(_texts(node.value, texts))
    return _Source(path, tree, texts)


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def _is_error(name: str, classes: dict[str, tuple[ast.ClassDef, _Source]]) -> bool:
    """Whether it derives from ShoalError; the base itself has no meaning of its own."""
    if name not in classes or name == "ShoalError":
        return False
    bases = _bases(classes[name][0])
    return "ShoalError" in bases or any(_is_error(base, classes) for base in bases)


def _with_code(
    name: str, classes: dict[str, tuple[ast.ClassDef, _Source]], entries: dict[str, ErrorEntry]
) -> str | None:
    """The class itself or its nearest ancestor that has a code."""
    while name not in entries:
        above = [base for base in _bases(classes[name][0]) if base in classes]
        if not above:
            return None
        name = above[0]
    return name


def _code(node: ast.ClassDef) -> str:
    for line in node.body:
        if (
            isinstance(line, ast.Assign)
            and isinstance(line.targets[0], ast.Name)
            and line.targets[0].id == "code"
            and isinstance(line.value, ast.Constant)
        ):
            return str(line.value.value)
    return ""


def _meaning(node: ast.ClassDef, source: _Source) -> str:
    own = ast.get_docstring(node)
    if own:
        return " ".join(own.split("\n\n")[0].split())
    drawn = re.search(rf"\b{node.name} +(\S.*)$", ast.get_docstring(source.tree) or "", re.MULTILINE)
    text = drawn[1].strip() if drawn else ""
    return text and text[0].upper() + text[1:] + "."


def _fixes(source: _Source) -> Iterator[tuple[str, str]]:
    """(class, fix) of every call that makes an error."""
    chosen = _choices(source)
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        for keyword in node.keywords:
            if keyword.arg == "fix":
                for text in _texts(keyword.value, source.texts):
                    for name in (node.func.id, *chosen.get(node.func.id, ())):
                        yield name, text


def _choices(source: _Source) -> dict[str, list[str]]:
    """The classes between which each `variable = A if ... else B` chooses."""
    chosen: dict[str, list[str]] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
            branches = [b.id for b in (node.value.body, node.value.orelse) if isinstance(b, ast.Name)]
            for target in node.targets:
                if isinstance(target, ast.Name):
                    chosen.setdefault(target.id, []).extend(branches)
    return chosen


def _texts(value: ast.expr, known: dict[str, str]) -> Iterator[str]:
    """What an expression can say; nothing if that is decided elsewhere."""
    match value:
        case ast.Constant(value=str(text)) if text:
            yield text
        case ast.Name(id=name) if name in known:
            yield known[name]
        case ast.IfExp():
            yield from _texts(value.body, known)
            yield from _texts(value.orelse, known)
        case ast.JoinedStr():
            parts = []
            for piece in value.values:
                if isinstance(piece, ast.Constant):
                    parts.append(str(piece.value))
                elif isinstance(piece, ast.FormattedValue):
                    parts.append(next(_texts(piece.value, known), "..."))
            yield "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write them: the repository's docs/")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
