"""A real Prometheus server for tests: Debian's binary, scraping what it is told."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

DEADLINE_SECONDS = 60.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def until(what: str, check: Callable[[], Any], log: Path) -> Any:
    """The first true value of `check`, asked again and again until the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = check()
        except (urllib.error.URLError, ConnectionError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.05)  # between questions; what is waited for is the answer
    raise AssertionError(f"{what}: last answer {last!r}; Prometheus said:\n{log.read_text()[-3000:]}")


def _listens_at(process: subprocess.Popen[bytes]) -> int | None:
    assert process.poll() is None, f"Prometheus ended with {process.returncode}"
    held = psutil.Process(process.pid).net_connections("tcp")
    return next((one.laddr.port for one in held if one.status == psutil.CONN_LISTEN), None)


class Prometheus:
    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def get(self, path: str) -> dict[str, Any]:
        with OPENER.open(self.url + path, timeout=10) as response:
            return json.loads(response.read())

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Value per label set, without the labels that every target gets."""
        told = self.get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        assert told["status"] == "success", told
        return {
            tuple(sorted((k, v) for k, v in row["metric"].items() if k not in ("job", "instance", "__name__"))): float(
                row["value"][1]
            )
            for row in told["data"]["result"]
        }


@contextlib.contextmanager
def prometheus_server(targets: Sequence[str], folder: Path, rules: Sequence[Path] = ()) -> Iterator[Prometheus]:
    """Prometheus, scraping `targets` (host:port) five times a second and following the rules in these files."""
    binary = shutil.which("prometheus")
    assert binary, "a real Prometheus server is missing: apt-get install -y prometheus"
    log = folder / "prometheus.log"
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 1s}\n"
        f"rule_files: {json.dumps([str(path) for path in rules])}\n"
        f"scrape_configs: [{{job_name: shoal, static_configs: [{{targets: {json.dumps(list(targets))}}}]}}]\n"
    )
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0", "--storage.tsdb.retention.time=1h",
            ],
            stdout=output, stderr=subprocess.STDOUT, env={"GOMAXPROCS": "1"},
        )  # fmt: skip
        try:
            # Its own choice of a port: one that was free before it started can be another's by then.
            port = until("listens", lambda: _listens_at(process), log)
            yield Prometheus(f"http://127.0.0.1:{port}", log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
