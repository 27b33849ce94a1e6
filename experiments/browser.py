"""A headless Chromium, driven over two pipes: what the page of a sweep is tested and timed with.

The DevTools protocol needs no web socket with ``--remote-debugging-pipe``: messages are JSON that
ends in a zero byte, read from file descriptor 3 and written to 4.
"""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

_PATIENCE_S = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# In the child: the pipes go to the two numbers that the browser takes, then it is what runs.
_START = (
    "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
_SPECIAL = {"Enter": ("\r", 13), "Tab": ("", 9)}


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class BrowserError(RuntimeError):
    """The browser, or a script in its page, failed."""


class Browser:
    """One window, as a context manager.

    ``errors`` collects what the pages' scripts threw, and ``requests`` every address asked for.
    """

    def __init__(self, width: int = 1400, height: int = 900):
        """Starts the browser.

        Args:
          width: of the window, in CSS pixels.
          height: of the window.

        Raises:
          BrowserError: there is no Chromium.
        """
        program = find()
        if program is None:
            raise BrowserError(f"no browser: none of {', '.join(_NAMES)} is installed.")
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        pipes = [_high(end) for pair in (os.pipe(), os.pipe()) for end in pair]
        there, self._write, self._read, back = pipes
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={self._profile.name}"]
        command += [f"--window-size={width},{height}", "--remote-debugging-pipe", "about:blank"]
        start = [sys.executable, "-S", "-c", _START, str(there), str(back), *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(start, pass_fds=(there, back), **quiet)
        os.close(there)
        os.close(back)
        self._buffer, self._number, self._session = b"", 0, None
        try:
            targets = self._call("Target.getTargets")["targetInfos"]
            target = next(one["targetId"] for one in targets if one["type"] == "page")
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network"):
                self._call(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser."""
        try:
            self._send("Browser.close", None)
            self._process.wait(10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def _send(self, method: str, session: str | None, **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._number

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise BrowserError("the browser ended, or does not answer.")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, self._session, **parameters)
        until = time.monotonic() + _PATIENCE_S
        while True:
            message = self._receive(until)
            if message.get("id") == number:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error'].get('message')}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            thrown = parameters["exceptionDetails"]
            self.errors.append(thrown.get("exception", {}).get("description", thrown["text"]))
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, path: str | os.PathLike[str], fragment: str = "") -> None:
        """Opens a file, and waits until it says in ``data-ready`` that it is shown."""
        # From an empty page: another fragment alone would not load the file again.
        for url in ("about:blank", pathlib.Path(path).resolve().as_uri() + fragment):
            self._call("Page.navigate", url=url)
        self.wait("document.documentElement?.dataset.ready")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        result = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise BrowserError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """Waits until an expression is true; returns its value."""
        until = time.monotonic() + _PATIENCE_S
        while not (value := self.evaluate(script)):
            if time.monotonic() > until:
                raise BrowserError(f"{script} did not become true; errors: {self.errors}")
            time.sleep(0.005)
        return value

    def settle(self) -> None:
        """Waits until what was done is painted."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.evaluate(f"{frame}.then(() => true)")

    def type(self, text: str) -> None:
        """Types into what has the focus, key by key."""
        for letter in text:
            self._call("Input.dispatchKeyEvent", type="keyDown", text=letter)
            self._call("Input.dispatchKeyEvent", type="keyUp")

    def press(self, key: str) -> None:
        """Presses ``"Enter"`` or ``"Tab"``."""
        text, code = _SPECIAL[key]
        same = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        more = {"text": text} if text else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", **same, **more)
        self._call("Input.dispatchKeyEvent", type="keyUp", **same)

    def resize(self, width: int, height: int) -> None:
        """Gives the window another size, in CSS pixels."""
        size = {"width": width, "height": height}
        self._call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Prefers ``"light"`` or ``"dark"`` colors."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole page as a PNG."""
        self.settle()
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        pathlib.Path(path).write_bytes(base64.b64decode(shot["data"]))


def _high(descriptor: int) -> int:
    # Out of the way of 3 and 4, which the child replaces.
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
