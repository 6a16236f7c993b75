"""A real browser for tests: Debian's Chromium without a window, driven over its DevTools pipe.

The protocol is JSON with a zero byte after each message, on the file descriptors 3 and 4 of the browser.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AXE = ROOT / ".venv/axe/axe_playwright_python/axe.min.js"  # ./dev puts it there
DEADLINE_SECONDS = 60.0
PHONE = (390, 844)
DESKTOP = (1280, 900)


class Page:
    """One tab. `js` asks, `until` waits for an answer; `noise` is what it logged, exceptions among it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._buffer = b""
        self._last_id = 0
        self._session = ""
        self.noise: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command; AssertionError if the browser refuses it or does not answer."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            told = self._read(method)
            if told.get("id") == self._last_id:
                assert "error" not in told, f"{method}: {told['error']}"
                return dict(told["result"])

    def _read(self, waiting_for: str) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser does not answer {waiting_for}"
            more = os.read(self._in, 1 << 20)
            assert more, f"the browser has ended during {waiting_for}"
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\0", 1)
        told: dict[str, Any] = json.loads(line)
        if told.get("method") == "Runtime.exceptionThrown":
            self.noise.append(json.dumps(told["params"]["exceptionDetails"])[:2000])
        elif told.get("method") == "Runtime.consoleAPICalled":
            self.noise.append(json.dumps(told["params"]["args"])[:2000])
        elif told.get("method") == "Log.entryAdded":
            self.noise.append(told["params"]["entry"]["text"])
        return told

    def open(self, url: str, *, size: tuple[int, int] = DESKTOP, dark: bool = False, still: bool = True) -> None:
        """Load `url` in a window of `size` CSS pixels; `still`: the user prefers reduced motion."""
        self.look(size=size, dark=dark, still=still)
        told = self.call("Page.navigate", url=url)
        assert not told.get("errorText"), told
        self.until("document.readyState === 'complete'")

    def look(self, *, size: tuple[int, int] = DESKTOP, dark: bool = False, still: bool = True) -> None:
        """Change the window and the user's preferences."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if width < 600 else 1, mobile=width < 600,
        )  # fmt: skip
        self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
            ],
        )

    def js(self, expression: str) -> Any:
        """The value of an expression; promises are awaited."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str, seconds: float = DEADLINE_SECONDS) -> None:
        """Ask until the answer is true; AssertionError with the page's text after `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.05)  # between questions; what is waited for is the answer

    def press(self, key: str) -> None:
        """One key, down and up."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "End": 35, "Home": 36}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key],
                **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}),
            )  # fmt: skip

    def violations(self) -> list[str]:
        """What axe-core, with all its rules of WCAG 2.2 A and AA and best practice, finds wrong with the page."""
        assert AXE.exists(), "axe-core is missing: ./dev test gets it"
        if self.js("typeof axe") == "undefined":
            self.js(AXE.read_text(encoding="utf-8") + ";0")
        found = self.js("axe.run({resultTypes: ['violations']}).then((told) => told.violations)")
        return [
            f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}" for rule in found for node in rule["nodes"]
        ]

    def picture(self, path: Path) -> None:
        """The whole page, below the window too, as a PNG."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own in `folder`, and all of its processes gone at the end."""
    binary = shutil.which("chromium")
    assert binary, "a real browser is missing: apt-get install -y chromium"
    browser_in, to_browser = os.pipe()
    from_browser, browser_out = os.pipe()

    log = folder / "chromium.log"
    # The shell puts the pipes where the browser looks for them; as root there is no sandbox to be had.
    script = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
    with log.open("wb") as said:
        process = subprocess.Popen(
            [
                "bash", "-c", script, "bash", binary, "--headless", "--no-sandbox", "--remote-debugging-pipe",
                "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--no-proxy-server",
                "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "about:blank",
            ],
            stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, pass_fds=(browser_in, browser_out),
            start_new_session=True,
        )  # fmt: skip
    os.close(browser_in)
    os.close(browser_out)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        with contextlib.suppress(ProcessLookupError):  # it ends by itself when its pipe closes
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
