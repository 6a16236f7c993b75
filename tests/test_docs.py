"""What the documents say can be done: commands parse, links lead somewhere, named files and tests exist."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError
from shoal.node.cli import app
from shoal.node.watching.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_LINES = 400
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
MODULES = {"demo": "node/demo.py", "bench": "benchmarks/{}.py"}  # those whose flags argparse reads


def commands(page: Path) -> Iterator[str]:
    """Command lines in code blocks and spans: what starts with ./dev or shoal, settings before it aside."""
    text = page.read_text(encoding="utf-8")
    spans = [" ".join(span.split()) for span in re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", FENCE.sub("", text))]
    for line in [line for block in FENCE.findall(text) for line in block.splitlines()] + spans:
        bare = re.sub(r"^([A-Z_]+=\S+ )+", "", line.strip())
        if re.match(r"(\./dev|shoal) \S", bare):
            yield bare


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def said() -> list[tuple[str, str]]:
    return [(name_of(page), command) for page in PAGES for command in commands(page)]


def flags_of(path: Path) -> set[str]:
    return {"--help"} | set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", path.read_text(encoding="utf-8")))


def check_shoal(words: list[str]) -> None:
    if "--config" in words:  # read before the command's own flags
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except MissingArgumentError as error:
        if len(words) > 1:  # else only the command's name, in a sentence
            pytest.fail(f"{words}: {error}")
    except CycloptsError as error:
        pytest.fail(f"{words}: {error}")


def check_dev(words: list[str]) -> None:
    script = (ROOT / "dev").read_text(encoding="utf-8")
    name, *rest = words
    assert re.search(rf"^  {name}\)", script, re.MULTILINE), f"./dev has no {name}"
    if name == "shoal":
        check_shoal(rest)
    elif name == "test":
        for word in rest:
            assert word.startswith("-") or (ROOT / word.split("::")[0]).exists(), word
    elif name in MODULES:
        which = rest[0] if name == "bench" else ""
        module = ROOT / MODULES[name].format(which)
        if not module.exists():
            module = module.with_suffix("") / "__main__.py"
        assert name == "demo" or re.search(rf'benchmarks=".*\b{which}\b', script), f"./dev bench has no {which}"
        flags = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert flags <= flags_of(module), flags - flags_of(module)
    else:
        assert not rest, words


def test_there_are_commands() -> None:
    found = {command for page, command in said() if page == "README.md"}
    assert {"./dev demo", "./dev test"} <= {" ".join(shlex.split(command, comments=True)) for command in found}
    assert len(said()) > 25


@pytest.mark.parametrize(("page", "command"), said())
def test_commands_parse(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    (check_dev if words[0] == "./dev" else check_shoal)(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_makes_a_folder_twice(page: Path) -> None:
    """Commands that make a checkpoint refuse a folder that is there: one after the other, they have to work."""
    made_by = {"upcycle": 1, "branch": 1, "export": 1, "mix": 0}  # which argument is the folder
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        made = []
        for line in block.splitlines():
            found = re.match(r"(?:\./dev )?shoal (upcycle|branch|export|mix) (.*)", line)
            if found:
                made.append(shlex.split(found[2], comments=True)[made_by[found[1]]])
        assert len(made) == len(set(made)), f"{made}: the second is refused"


@pytest.mark.parametrize("wrong", ["./dev dance", "./dev demo --fast", "./dev shoal join INVITE --nope", "shoal leave"])
def test_wrong_commands_are_noticed(wrong: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_commands_parse("", wrong)


@functools.cache
def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def tree() -> list[str]:
    """Paths in README's annotated tree; four blanks are one level down."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1]
    block = FENCE.search(section)
    assert block is not None
    paths, above = [], [""] * 8
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        name = line.split()[0]
        above[depth + 1] = above[depth] + name
        paths.append(above[depth + 1])
    return paths


def test_the_tree_in_the_readme_exists() -> None:
    paths = tree()
    assert len(paths) > 40
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert not [path for path in paths if (ROOT / path).is_dir() != path.endswith("/")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:node|protocol|kernels|benchmarks|tests|docs|deploy)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path
    for path, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        names = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)}
        assert test in names, f"{path}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_one_page_one_concept(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_page_is_linked_from_another() -> None:
    """Whoever starts at the README finds every page by links."""
    found, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in found or page not in PAGES:
            continue
        found.add(page)
        targets = re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", page.read_text(encoding="utf-8")))
        ahead += [(page.parent / target).resolve() for target in targets if "://" not in target]
    assert not [name_of(page) for page in PAGES if page not in found]


def test_every_trap_names_what_guards_it() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    traps = re.split(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)[1:]
    assert [int(number) for number in traps[::2]] == list(range(1, len(traps) // 2 + 1))
    for number, trap in zip(traps[::2], traps[1::2], strict=True):
        assert "tests/" in trap or "No test" in trap, f"trap {number}"


def test_events_that_operators_are_told_of_are_logged() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "node").rglob("*.py"))
    section = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8").split("## Logs")[1].split("\n## ")[0]
    events = [
        event for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for event in re.findall(r"`(.+?)`", row)
    ]
    assert len(events) > 12
    assert not [event for event in events if f'"{event}"' not in code]


def test_named_metrics_exist() -> None:
    ends = ("_bucket", "_sum", "_count")  # the series of a histogram
    known = {spec.exposed_name for spec in METRICS} | {spec.name + end for spec in METRICS for end in ends}
    for page in PAGES:
        named = set(re.findall(r"\bshoal_[a-z_]+", page.read_text(encoding="utf-8")))
        assert named <= known, (name_of(page), named - known)


def test_what_peers_warn_of_is_explained() -> None:
    explained = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    for part in ("node", "protocol"):
        for file in (ROOT / part).rglob("*.py"):
            for event in re.findall(
                r'log\.(?:warning|error)\(\s*"([a-z_]+\.[a-z_]+)"', file.read_text(encoding="utf-8")
            ):
                assert f"`{event}`" in explained, f"{event} of {file.relative_to(ROOT)}"
