"""A headless Chromium that opens pages of this machine, driven through the pipe of its debugging protocol.

Chromium comes from the PATH (Debian: ``apt-get install chromium``) or from ``$LEANSTEP_BROWSER``. It reaches no
other host.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no browser: apt-get install chromium, or LEANSTEP_BROWSER=PATH of a Chromium or Chrome"
SECONDS = 120


def browser_path() -> str | None:
    """Path of the browser, or None."""
    names = [os.environ["LEANSTEP_BROWSER"]] if os.environ.get("LEANSTEP_BROWSER") else NAMES
    return next((path for name in names if (path := shutil.which(name))), None)


class Screen(NamedTuple):
    """What a page is shown on; sizes in CSS pixels."""

    width: int = 1200
    height: int = 900
    scheme: str = "light"
    media: str = "screen"


class Visit(NamedTuple):
    """What the browser said while it showed a page: messages of its console, and addresses it asked for."""

    messages: list[str]
    requests: list[str]


class Browser:
    """One tab of a browser."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.buffer = b""
        self.number = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            received = os.read(self.reading, 1 << 20)
            assert received, "the browser ended"
            self.buffer += received
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page: Path | str, screen: Screen) -> Visit:
        """Show a file, or an address of this machine; return what happened until it was drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=screen.width, height=screen.height, deviceScaleFactor=1, mobile=screen.width < 600,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": screen.scheme}]
        self.call("Emulation.setEmulatedMedia", media=screen.media, features=features)
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        end = time.monotonic() + SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end, f"{page} was not loaded in {SECONDS} s"
            self._receive()
        # two frames later everything is laid out and drawn, and every refusal of the content policy is told
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        return Visit(list(self._messages()), list(self._requests()))

    def _messages(self) -> Iterator[str]:
        for event in self.events:
            values = event["params"]
            if event["method"] == "Log.entryAdded":
                yield values["entry"]["text"]
            elif event["method"] == "Runtime.exceptionThrown":
                yield values["exceptionDetails"]["text"]
            elif event["method"] == "Runtime.consoleAPICalled":
                yield str([argument.get("value") for argument in values["args"]])

    def _requests(self) -> Iterator[str]:
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent":
                yield event["params"]["request"]["url"]

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page, promises awaited."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, height: int | None = None, top: float = 0) -> None:
        """Write a PNG of the page as it is shown: all of it from ``top`` on, or ``height`` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        height = height or size["height"] - top
        clip = {"x": 0, "y": top, "width": size["width"], "height": height, "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed on A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(answer["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a browser whose profile is in ``folder``; end it afterwards."""
    path = browser_path()
    assert path is not None, MISSING
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()
    options = [
        "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--disable-gpu",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check",
        "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        # Chromium's sandbox cannot be set up by root
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip

    def place() -> None:
        # the protocol's pipes are descriptors 3 and 4
        source, target = os.dup(to_browser), os.dup(from_browser)
        os.dup2(source, 3)
        os.dup2(target, 4)

    process = subprocess.Popen(
        [path, *options], preexec_fn=place, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(reading, writing)
    finally:
        os.close(writing)
        os.close(reading)
        process.terminate()
        process.wait(timeout=SECONDS)
