"""Settings from elsewhere than flags: the environment, and a TOML file of which each command takes what it knows."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict, Env

from .config import ENV_PREFIX
from .errors import ConfigError

Source = Callable[[App, tuple[str, ...], ArgumentCollection], None]


@contextmanager
def settings_from(
    file: Path | None, commands: Mapping[str, App], last: Mapping[str, Sequence[Source]]
) -> Iterator[None]:
    """In the block, `commands` take settings from the environment and `file`; then `last`, by command."""
    files = {} if file is None else for_each(commands, read_settings(file), file)
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
