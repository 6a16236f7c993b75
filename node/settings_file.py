"""Settings from elsewhere than flags: the environment, and a TOML file of which each command takes what it knows."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict, Env

from .config import ENV_PREFIX
from .errors import ConfigError

ALIKE = 0.88  # of names, as `difflib` counts: a letter or two are wrong

Source = Callable[[App, tuple[str, ...], ArgumentCollection], None]


@contextmanager
def settings_from(
    file: Path | None, commands: Mapping[str, App], last: Mapping[str, Sequence[Source]]
) -> Iterator[None]:
    """In the block, `commands` take settings from the environment and `file`; then `last`, by command."""
    files = {} if file is None else for_each(commands, read_settings(file), file)
    for wrong, right in misspelt(commands, os.environ):
        print(f"shoal: {wrong} is no setting, and not used: {right} is one", file=sys.stderr)
    before = {name: command.config for name, command in commands.items()}
    try:
        for name, command in commands.items():
            # cyclopts lets an earlier source win over a later one; flags come before all of them.
            of_file = [files[name]] if name in files else []
            command.config = [Env(ENV_PREFIX, command=False), *of_file, *last.get(name, ())]
        yield
    finally:
        for name, command in commands.items():
            command.config = before[name]


def forget_empty_variables() -> None:
    """A setting that is set to nothing is not set: compose files have `SHOAL_RELAY: ${RELAY:-}`."""
    for name in [name for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and not value.strip()]:
        del os.environ[name]


def misspelt(commands: Mapping[str, App], names: Iterable[str]) -> list[tuple[str, str]]:
    """Variables that are much like a setting's, and that setting's. Others may be anybody's: Kubernetes tells where a
    service `shoal` is by SHOAL_PORT and the like."""
    ours = [name for name in names if name.startswith(ENV_PREFIX)]
    if not ours:
        return []
    known = {f"{ENV_PREFIX}{name.upper()}" for command in commands.values() for name in _known_to(command)}
    known |= {f"{ENV_PREFIX}HOME", f"{ENV_PREFIX}CONFIG"}
    found = {name: get_close_matches(name, known, n=1, cutoff=ALIKE) for name in ours if name not in known}
    return [(name, right[0]) for name, right in found.items() if right]


def inside_the_peers(folder: str) -> Source:
    """For a command that is a peer of its own: where only the peer's data directory is said, `folder` in that."""

    def source(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        where = arguments.get("--data-dir")
        where.tokens = [
            token if token.source == "cli" else token.evolve(value=str(Path(token.value) / folder))
            for token in where.tokens
        ]

    return source


def read_settings(file: Path) -> dict[str, Any]:
    """What it says. ConfigError if it is missing, no TOML, or divided into tables."""
    file = file.expanduser()  # no shell does it in the environment, or after a `=`
    if not file.is_file():
        raise ConfigError(f"there is no settings file {file}", fix="check --config and SHOAL_CONFIG")
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", fix="settings look like: http_port = 8470") from None
    for name, value in settings.items():
        if isinstance(value, dict):
            raise ConfigError(f"{file} has a table [{name}]", fix="put its settings at the top, in no table")
    return settings


def for_each(commands: Mapping[str, App], settings: Mapping[str, Any], file: Path) -> dict[str, Dict]:
    """By command, the source of its settings: all but what only others know. What none knows is left in, for each to
    refuse."""
    known = {name: _known_to(command) for name, command in commands.items()}
    everything = set().union(*known.values())
    return {
        command: Dict(
            {name: value for name, value in settings.items() if name.replace("-", "_") not in everything - mine},
            use_commands_as_keys=False,
            source=str(file),
        )
        for command, mine in known.items()
    }


def _known_to(command: App) -> set[str]:
    """Settings of a command, as they are named in the file."""
    parsed = (argument for argument in command.assemble_argument_collection() if argument.parse)
    return {name.removeprefix("--").replace("-", "_") for argument in parsed for name in argument.names}
