"""The peer's HTTP server: metrics, health and status, for machines and people. Reads `PeerState`, changes nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ..errors import ConfigError
from .metrics import make_registry
from .state import PeerState
from .status import page

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # further ones are closed at once, so that a flood costs no threads
IDLE_SECONDS = 5.0  # a client that sends or takes nothing for so long is dropped
CONNECTION_SECONDS = 30.0  # and none is served for longer than this


class StatusServer:
    """Serves one peer's state until closed. Each connection has its own thread and carries one request.

    Args:
        state: what to serve.
        host, port: where to listen; port 0 takes any free one, `url` tells which.
        stall_seconds: /healthz says 503 when the main loop has been silent for longer.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self, state: PeerState, *, host: str = "127.0.0.1", port: int = 0, stall_seconds: float = 120.0
    ) -> None:
        try:
            self._server = _Server((host, port), state, stall_seconds)
        except OSError as error:
            raise ConfigError(
                f"cannot serve status on {host}:{port}: {error.strerror or error}",
                fix="choose another --http-port (0 takes any free one) or --http-host",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="status-http", daemon=True
        )

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        """Where this machine reaches it, without a trailing slash."""
        host = str(self._server.server_address[0])
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> StatusServer:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening, cut what is being served, and return when every thread has ended. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    def __enter__(self) -> StatusServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 makes a burst of clients wait for TCP to try again
    daemon_threads = True  # a peer that dies without closing us must not wait for a client

    def __init__(self, address: tuple[str, int], state: PeerState, stall_seconds: float) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.state = state
        self.stall_seconds = stall_seconds
        self.registry: CollectorRegistry = make_registry(state)
        self.page, self.page_policy = page()
        self._open: dict[socket.socket, tuple[float, threading.Thread]] = {}
        self._open_lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="status-http-client", daemon=True
        )
        with self._open_lock:
            admitted = len(self._open) < MAX_CONNECTIONS
            if admitted:
                self._open[request] = (time.monotonic(), thread)
        if admitted:
            thread.start()
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self.close_connections(older_than=CONNECTION_SECONDS, wait=False)

    def close_connections(self, older_than: float = -math.inf, *, wait: bool = True) -> None:
        with self._open_lock:
            now = time.monotonic()
            late = [(request, thread) for request, (since, thread) in self._open.items() if now - since > older_than]
            for request, _ in late:
                with contextlib.suppress(OSError):  # the client was faster
                    request.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
        if wait:
            for _, thread in late:
                thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("status client %s went away", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "shoal"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._reply(200, content_type, encode(self.server.registry))
        elif path == "/healthz":
            problem = self._problem()
            self._reply(503 if problem else 200, "text/plain; charset=utf-8", (problem or "ok").encode() + b"\n")
        elif path == "/readyz":
            snapshot = self.server.state.snapshot()
            status = 200 if snapshot["in_the_run"] else 503
            self._reply(status, "text/plain; charset=utf-8", f"{snapshot['phase']}\n".encode())
        elif path == "/status.json":
            body = json.dumps(self.server.state.snapshot(), allow_nan=False).encode()
            self._reply(200, "application/json", body)
        elif path in ("/", "/status"):
            self._reply(200, "text/html; charset=utf-8", self.server.page, policy=self.server.page_policy)
        else:
            self._reply(404, "text/plain; charset=utf-8", b"not here; try /status\n")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._reply(
            405, "text/plain; charset=utf-8", b"only GET and HEAD: nothing here can be changed\n", allow="GET, HEAD"
        )

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _problem(self) -> str:
        snapshot = self.server.state.snapshot()
        if snapshot["phase"] == "failed":
            return (
                f"failed: {snapshot['phase_detail'] or (snapshot['last_error'] or {}).get('cause', 'no reason given')}"
            )
        age = snapshot["heartbeat_age_seconds"]
        if age > self.server.stall_seconds:
            return f"stalled: the main loop has been silent for {age:.0f} s in phase {snapshot['phase']}"
        return ""

    def _reply(
        self, status: int, content_type: str, body: bytes, *, policy: str = "default-src 'none'", allow: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if allow:
            self.send_header("Allow", allow)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http %s " + format, self.client_address[0], *args)
