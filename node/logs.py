"""Structured logging: an event name, then fields.

    log = get_logger(__name__)
    log.info("outer.committed", round=12, members=4, seconds=1.3)

On a terminal that reads `12:03:44 info     outer.committed  round=12 members=4 seconds=1.3`; elsewhere it is one JSON
object a line. `protocol` and `kernels` log with plain `logging`; their messages become events as they are, and what
they pass in `extra` becomes fields. No secret gets through: raw bytes are never written, fields with a secret's name
and private keys and tokens inside text are blanked.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

# Third parties that bring handlers or a flood of messages. They speak from WARNING on, in debug mode from INFO on.
THIRD_PARTIES = (
    "hivemind", "libp2p", "transformers", "bitsandbytes", "datasets", "multiaddr", "urllib3", "filelock", "fsspec",
    "trio", "asyncio", "concurrent.futures",
)  # fmt: skip

# By number: hivemind renames WARNING for the whole process.
_LEVELS = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "fields", "taskName"}
_SECRET_NAME = re.compile(r"(?:^|[_-])(?:seed|secret|password|passphrase|private[_-]?key|token|authorization)$", re.I)
_SECRET_TEXT = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.S), "<private key>"),
    (re.compile(r"([?&](?:token|secret|key)=)[^&\s\"']+", re.I), r"\1<hidden>"),
)


class EventLogger:
    """A logger whose messages are event names and whose keyword arguments are fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", event, extra={"fields": fields}, exc_info=exc_info, stacklevel=3)


def get_logger(name: str) -> EventLogger:
    return EventLogger(name)


def configure(*, format: LogFormat = "auto", level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Make every logger of this process write to `stream` (standard error) in one format.

    `auto` is the console format on a terminal and JSON otherwise. Call again to change it; call
    `adopt_third_parties` after importing hivemind or transformers, which install handlers of their own.
    """
    out = sys.stderr if stream is None else stream
    if format == "auto":
        format = "console" if out.isatty() else "json"
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter() if format == "json" else ConsoleFormatter(colour=_wants_colour(out)))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, _Formatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # hivemind's Go daemon and children that import hivemind read their level here.
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "INFO" if level == "debug" else "WARNING")
    adopt_third_parties()


def adopt_third_parties() -> None:
    """Take third parties' handlers away, so that what they say comes out once, in our format, at a bearable level."""
    level = logging.INFO if logging.getLogger().getEffectiveLevel() <= logging.DEBUG else logging.WARNING
    for name in THIRD_PARTIES:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(level)


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Formatter(logging.Formatter):
    """What both formats share: taking a record apart, without its secrets."""

    def event(self, record: logging.LogRecord) -> str:
        return _without_secrets(record.getMessage())

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        given = getattr(record, "fields", None)
        if isinstance(given, Mapping):
            fields |= given
        return {str(name): _plain(str(name), value) for name, value in fields.items()}

    def traceback(self, record: logging.LogRecord) -> str:
        return _without_secrets(self.formatException(record.exc_info)) if record.exc_info else ""


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, logger, event, then the fields, then any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": _level(record),
            "logger": record.name,
            "event": self.event(record),
        }
        # A field may not pretend to be the time or the level.
        line.update((f"{name}_" if name in line else name, value) for name, value in self.fields(record).items())
        if traceback := self.traceback(record):
            line["traceback"] = traceback
        return json.dumps(line, ensure_ascii=False, allow_nan=False)


class ConsoleFormatter(_Formatter):
    """A line for people; a third party's or a library's message names its logger."""

    _COLOURS: Mapping[str, str] = {"debug": "2", "info": "36", "warning": "33", "error": "31", "critical": "1;31"}

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        level = _level(record)
        event = "".join(char if char.isprintable() else repr(char)[1:-1] for char in self.event(record))
        parts = [
            self._paint("2", datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")),
            self._paint(self._COLOURS.get(level, "0"), f"{level:<8}"),
            self._paint("1", event) if hasattr(record, "fields") else event,
        ]
        if not hasattr(record, "fields"):
            parts.append(self._paint("2", f"({record.name})"))
        fields = self.fields(record)
        if fields:
            parts.append(" " + " ".join(self._paint("2", f"{name}=") + _console(v) for name, v in fields.items()))
        line = " ".join(parts)
        if traceback := self.traceback(record):
            line += "\n" + traceback
        return line

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _level(record: logging.LogRecord) -> str:
    return _LEVELS.get(record.levelno) or record.levelname.lower()


def _console(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Quoting also keeps a peer's line breaks and escape codes from forging lines.
    return text if text and text.isprintable() and not re.search(r"[\s=\"]", text) else json.dumps(text)


def _plain(name: str, value: Any) -> Any:
    """`value` as JSON can hold it, blanked if it is or may be a secret."""
    if _SECRET_NAME.search(name):
        return "<hidden>"
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {str(key): _plain(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain("", item) for item in value]
    return _without_secrets(str(value))


def _without_secrets(text: str) -> str:
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text
