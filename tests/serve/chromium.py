"""A headless Chromium with a microphone of its own, driven over its debugging protocol."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--mute-audio",
    "--remote-debugging-port=0",
    "--window-size=1120,1180",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)


def find_chromium() -> str | None:
    """Path of a Chromium, or ``None``."""
    return next((path for name in BINARIES if (path := shutil.which(name))), None)


class Tab:
    """The page: JavaScript in, values out."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.complaints: list[str] = []
        """Errors that the page wrote to its console, or threw."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, within_s: float = 15.0, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        end = time.monotonic() + within_s
        while True:
            told = json.loads(self._socket.recv(timeout=max(0.01, end - time.monotonic())))
            self._listen(told)
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return told["result"]

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, script: str, within_s: float = 10.0) -> Any:
        end = time.monotonic() + within_s
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"not within {within_s:g} s: {script}; {self.complaints}"
            time.sleep(0.05)
        return value

    def picture(self, path: Path) -> None:
        told = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(told["data"]))

    def _listen(self, told: dict[str, Any]) -> None:
        method, facts = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(facts["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.complaints.append(facts["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
            self.complaints.append(json.dumps(facts["args"])[:500])


@contextmanager
def browser(microphone: Path | None = None, *flags: str):
    """A tab; the microphone hears a file over and over, or else a beep a second."""
    from websockets.sync.client import connect

    path = find_chromium()
    assert path is not None
    if microphone is not None:
        flags = (*flags, f"--use-file-for-fake-audio-capture={microphone}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [path, *FLAGS, *flags, f"--user-data-dir={folder}", "about:blank"]
        environment = {**os.environ, "HOME": folder}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            socket = connect(
                _address(Path(folder), process), max_size=None, compression=None, open_timeout=15, ping_interval=None
            )
            with socket:
                yield Tab(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _address(folder: Path, process: subprocess.Popen, within_s: float = 30.0) -> str:
    """Of the first tab's debugger."""
    import urllib.request

    told, end = folder / "DevToolsActivePort", time.monotonic() + within_s
    while True:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        assert time.monotonic() < end, f"Chromium did not start within {within_s:g} s"
        try:
            port = told.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            return tabs[0]["webSocketDebuggerUrl"]
        except (OSError, IndexError):
            time.sleep(0.05)
