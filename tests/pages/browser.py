"""A headless Chromium, driven by its DevTools protocol over a pipe: no package, one process, one tab."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Browser", "Loaded", "find_chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # pages of ours only; containers and root have no sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-features=OptimizationHints,OptimizationGuideOnDeviceModel,Translate,MediaRouter",
    "--no-first-run",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--remote-debugging-pipe",
)
# the protocol is spoken on the file descriptors 3 and 4
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
SECONDS = 120.0


def find_chromium() -> str | None:
    """The browser of `CHROMIUM`, or one on the path; None where there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for found in map(shutil.which, NAMES) if found), None)


@dataclass
class Loaded:
    """What a page did while it was loaded and looked at: requests beyond itself, and complaints of the console."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Browser:
    """One tab of a Chromium; `close` ends its process."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_child, self.writer = os.pipe()
        self.reader, from_child = os.pipe()
        # above 4, so that neither is overwritten by the other
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, from_child)]
        words = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, ends), *words], pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for end in (to_child, from_child, *ends):
            os.close(end)
        self.buffer, self.count = b"", 0
        self.loaded, self.finished = Loaded(), False
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that arrive before are noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        """The next message."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.reader, 1 << 20) if ready else b""
            assert part, f"Chromium says nothing (exit status {self.process.poll()})"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, message: Mapping[str, Any]) -> None:
        """Keep what a page must not do."""
        method, given = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self.finished = True
        elif method == "Network.requestWillBeSent":
            self.loaded.requests.append(given["request"]["url"][:200])
        elif method == "Runtime.exceptionThrown":
            self.loaded.complaints.append(json.dumps(given["exceptionDetails"])[:300])
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.loaded.complaints.append(json.dumps(given["args"])[:300])
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.loaded.complaints.append(given["entry"]["text"][:300])

    def load(self, page: Path | str) -> Loaded:
        """Open a file or address and wait until it is loaded; what it does from now on is noted in the result."""
        self.loaded, self.finished = Loaded(), False
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        while not self.finished:
            self.note(self.receive())
        return self.loaded

    def look(self, width: int, *, dark: bool = False, media: str = "", height: int = 900) -> None:
        """Set the size of the window, the colours that the reader prefers, and the medium ("print")."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def run(self, script: str) -> Any:
        """Evaluate JavaScript, and wait where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path: Path | None = None) -> bytes:
        """A picture of all of the page as PNG, written to `path` if it is given."""
        height = min(15_000, self.run("Math.ceil(document.documentElement.scrollHeight)"))
        clip = {"x": 0, "y": 0, "width": self.run("innerWidth"), "height": height, "scale": 1}
        form = {"format": "png", "optimizeForSpeed": True}  # fewer seconds, more bytes
        shot = self.call("Page.captureScreenshot", **form, captureBeyondViewport=True, clip=clip)
        content = base64.b64decode(shot["data"])
        if path is not None:
            path.write_bytes(content)
        return content

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.reader)
        os.close(self.writer)
