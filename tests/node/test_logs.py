"""Logs: one event a line in either format, everybody's messages in it, nobody's secrets."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
from shoal.node import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def out() -> io.StringIO:
    stream = io.StringIO()
    logs.configure(format="json", level="info", stream=stream)
    return stream


def test_json_has_one_object_a_line(out: io.StringIO) -> None:
    log = logs.get_logger("shoal.node.test")
    log.info("outer.committed", round=3, members=["a", "b"], seconds=1.5, loss=float("nan"), note="two\nlines %s")
    log.debug("not.shown")
    (line,) = lines(out)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info", "logger": "shoal.node.test", "event": "outer.committed", "round": 3, "members": ["a", "b"],
        "seconds": 1.5, "loss": "nan", "note": "two\nlines %s",
    }  # fmt: skip


def test_plain_logging_comes_out_right(out: io.StringIO) -> None:
    log = logging.getLogger("shoal.protocol.anything")
    log.warning("lease of slot %d lost", 7, extra={"slot": 7})
    logging.addLevelName(logging.WARNING, "WARN")  # as hivemind does on import
    try:
        log.warning("%s", "100%")
    finally:
        logging.addLevelName(logging.WARNING, "WARNING")
    first, second = lines(out)
    assert (first["event"], first["slot"], first["level"]) == ("lease of slot 7 lost", 7, "warning")
    assert (second["event"], second["level"]) == ("100%", "warning")


def test_traceback_and_reserved_names(out: io.StringIO) -> None:
    try:
        raise KeyError("gone")
    except KeyError:
        logs.get_logger("x").exception("step.failed", level="mine", name="n", message="m")
    (line,) = lines(out)
    assert line["level"] == "error"
    assert (line["level_"], line["name"], line["message"]) == ("mine", "n", "m")
    assert line["traceback"].endswith("KeyError: 'gone'")


@pytest.mark.parametrize("format", ["json", "console"])
def test_secrets_never_come_out(format: logs.LogFormat) -> None:
    stream = io.StringIO()
    logs.configure(format=format, stream=stream)
    secret = "c0ffee-do-not-print"
    log = logs.get_logger("x")
    log.info(
        "a", seed=secret, private_key=secret, api_token=secret, nested={"password": secret}, tokens=12, raw=b"c0ffee"
    )
    log.info("b", invite=f"shoal://h/run?v=1&token={secret}", pem=f"-----BEGIN PRIVATE KEY-----\n{secret}\n")
    logging.getLogger("y").info("joining shoal://h/run?token=%s", secret, extra={"secret": secret})
    try:
        raise ValueError(f"bad invite ?token={secret}")
    except ValueError:
        log.exception("c")
    text = stream.getvalue()
    assert "c0ffee" not in text
    assert "12" in text
    assert "shoal://h/run?v=1" in text


def test_console_is_for_people_and_cannot_be_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    logs.configure(format="console", stream=stream)
    logs.get_logger("x").info("peer.seen", phase="training", loss=1.23456789, said="evil\n00:00:00 info fake\x1b[31m")
    logging.getLogger("lib").warning("one\ntwo")
    first, second = stream.getvalue().splitlines()
    assert "peer.seen  phase=training loss=1.23457 said=" in first
    assert "\x1b" not in first
    assert "one\\ntwo (lib)" in second
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    logs.configure(stream=terminal)
    logs.get_logger("x").error("bad")
    assert "\x1b[31m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    logs.configure(stream=(terminal := Terminal()))
    logs.get_logger("x").error("bad")
    assert "\x1b" not in terminal.getvalue()
    assert "bad" in terminal.getvalue()


def test_auto_is_json_away_from_a_terminal_and_reconfiguring_does_not_double() -> None:
    streams = [io.StringIO(), io.StringIO()]
    for stream in streams:
        logs.configure(stream=stream)
    logs.get_logger("x").info("once")
    assert streams[0].getvalue() == ""
    assert [line["event"] for line in lines(streams[1])] == ["once"]


def test_third_parties_lose_their_handlers_and_their_chatter(out: io.StringIO) -> None:
    theirs = logging.getLogger("hivemind")
    own = io.StringIO()
    theirs.addHandler(logging.StreamHandler(own))
    theirs.propagate = False
    logs.adopt_third_parties()
    logging.getLogger("hivemind.averaging").info("chatter")
    logging.getLogger("hivemind.averaging").warning("trouble")
    assert own.getvalue() == ""
    assert [line["event"] for line in lines(out)] == ["trouble"]


def test_the_real_hivemind_is_tamed() -> None:
    program = (
        "from shoal.node import logs\nlogs.configure(format='json')\n"
        "import hivemind.utils.logging as theirs\nlogs.adopt_third_parties()\n"
        "theirs.get_logger('hivemind.dht').warning('hello')\n"
        "theirs.get_logger('hivemind.dht').info('chatter')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events if event["logger"] == "hivemind.dht"] == ["hello"]
    assert not [line for line in done.stderr.splitlines() if "hello" in line and not line.startswith("{")]
