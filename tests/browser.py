"""A real browser, where there is one: Chromium without a window, spoken to through a pipe.

The DevTools protocol over file descriptors 3 and 4, a JSON object each way ended by a zero byte;
nothing but the standard library.
"""

import base64
import json
import os
import select
import shutil
import signal
import tempfile
from pathlib import Path

NAMES = (
    "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser",
    "google-chrome", "google-chrome-stable", "chrome",
)  # fmt: skip
PATIENCE = 60  # s, on a busy machine
PLAYWRIGHT = Path.home() / ".cache" / "ms-playwright"
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def find_browser() -> str | None:
    """A Chromium on the path, or one of Playwright's."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    for name in ("chrome-headless-shell", "headless_shell", "chrome"):
        found += [str(path) for path in sorted(PLAYWRIGHT.glob(f"*/*/{name}"))]
    return found[0] if found else None


class Browser:
    """One page in one browser; a context."""

    def __init__(self, program: str):
        self.program, self.events, self.sent = program, [], 0

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_there, self.out = os.pipe()
        self.incoming, write_there = os.pipe()
        arguments = [self.program, *QUIET, f"--user-data-dir={self.profile.name}", "about:blank"]
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        ends = [(os.POSIX_SPAWN_DUP2, ours, fd) for ours, fd in ((read_there, 3), (write_there, 4))]
        self.process = os.posix_spawn(
            self.program, arguments, os.environ, file_actions=[*silent, *ends]
        )
        os.close(read_there)
        os.close(write_there)
        self.buffer, self.session = b"", None
        try:
            targets = self("Target.getTargets")["targetInfos"]
        except BaseException:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            raise
        (page,) = [each for each in targets if each["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self("Browser.close")
        os.waitpid(self.process, 0)
        os.close(self.out)
        os.close(self.incoming)
        self.profile.cleanup()

    def __call__(self, method, **parameters):
        """A command's result; what the browser tells meanwhile is kept in `events`."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url, width=1280, height=900, dark=False, script=True):
        """Load a page; returns when it is there with its pictures."""
        self.events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", features=scheme)
        self("Emulation.setScriptExecutionDisabled", value=not script)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def ask(self, expression):
        """The value of a line of JavaScript."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self):
        """Errors and warnings of the console, and failed loads, since the page was opened."""
        found = []
        for event in self.events:
            facts, method = event["params"], event["method"]
            if method == "Log.entryAdded":
                found.append(facts["entry"]["text"])
            elif method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
                found.append(json.dumps(facts))
            elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning"):
                found.append(json.dumps(facts["args"]))
        return found

    def requests(self):
        """Addresses asked for since the page was opened, data URIs aside."""
        urls = [e["params"]["request"]["url"] for e in self.events
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path, whole=True):
        """The page as PNG."""
        found = self("Page.captureScreenshot", captureBeyondViewport=whole, format="png",
                     **({"clip": self._whole()} if whole else {}))  # fmt: skip
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def _whole(self):
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def _next(self):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.incoming], [], [], PATIENCE)
            assert ready, f"{self.program} has said nothing for {PATIENCE} s"
            piece = os.read(self.incoming, 1 << 20)
            assert piece, f"{self.program} ended"
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
