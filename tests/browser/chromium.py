"""A headless Chromium, driven over its DevTools protocol: open a page, ask it questions, take its picture.

Only what tests and benchmarks of the report need. The protocol is JSON over a websocket; aiohttp, which Ray
brings, speaks it. Everything runs in the caller's thread: events that arrive while an answer is awaited are
kept.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL by software, without a warning
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--remote-debugging-port=0",
)
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "ArrowLeft": (37, ""), "ArrowUp": (38, "")}
"""Virtual key codes, and the text that a key enters."""
START_TIMEOUT_S = 120
CALL_TIMEOUT_S = 120


def find_chromium() -> str | None:
    """Path of the browser: $RAYSCAN_CHROMIUM, or the first of the usual names on the path."""
    names = (os.environ.get("RAYSCAN_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Chromium:
    """One browser with one tab. `problems` and `requests` belong to the page opened last."""

    def __init__(self, binary: str) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._calls = 0
        self._profile = tempfile.TemporaryDirectory(prefix="rayscan-chromium-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop = asyncio.new_event_loop()
        try:
            self._loop.run_until_complete(self._connect(self._endpoint()))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the browser and remove its profile."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if hasattr(self, "_http"):
            self._loop.run_until_complete(self._http.close())
        self._loop.close()
        self._profile.cleanup()

    def view(self, width: int = 1200, height: int = 900, *, dark: bool = False, media: str = "") -> None:
        """Size of the window in CSS pixels, preferred colour scheme, and medium ("print" or as usual)."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})

    def open(self, page: Path, before: str = "") -> None:
        """Load a file and wait until it is loaded. `before` runs ahead of the page's own scripts."""
        self.problems, self.requests, self._events = [], [], []
        script = self._call("Page.addScriptToEvaluateOnNewDocument", {"source": before})
        self._call("Page.navigate", {"url": page.resolve().as_uri()})
        self._loop.run_until_complete(self._until("Page.loadEventFired"))
        self._call("Page.removeScriptToEvaluateOnNewDocument", script)

    def ask(self, expression: str) -> Any:
        """Value of a JavaScript expression (awaited if it is a promise), as JSON brings it over."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        reply = self._call("Runtime.evaluate", params)
        if "exceptionDetails" in reply:
            raise AssertionError(f"{expression}: {_describe(reply['exceptionDetails'])}")
        return reply["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key: "Tab", "Enter", "ArrowLeft", or a sign such as "+"."""
        code, text = KEYS.get(key, (ord(key[0]), key))
        event = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self._call("Input.dispatchKeyEvent", {"type": "keyDown" if text else "rawKeyDown", **event})
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def busy_s(self) -> float:
        """CPU time of the page's main thread since it was opened, whatever else the machine does."""
        metrics = self._call("Performance.getMetrics")["metrics"]
        return float(next(item["value"] for item in metrics if item["name"] == "TaskDuration"))

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """PNG of the window, or of the whole page."""
        params = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            params["clip"] = {**size, "scale": 1}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", params)["data"]))

    def _endpoint(self) -> str:
        """Address the browser listens on, which it writes into its profile."""
        port_file = Path(self._profile.name) / "DevToolsActivePort"
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and self._process.poll() is None:
            lines = port_file.read_text().split() if port_file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise RuntimeError(f"Chromium did not start (exit code {self._process.poll()})")

    async def _connect(self, endpoint: str) -> None:
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(endpoint, max_msg_size=0)
        self._session: str | None = None
        target = await self._exchange("Target.createTarget", {"url": "about:blank"})
        attach = {"targetId": target["targetId"], "flatten": True}
        self._session = (await self._exchange("Target.attachToTarget", attach))["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._exchange(f"{domain}.enable", {})
        await self._exchange("Performance.enable", {"timeDomain": "threadTicks"})
        await self._exchange("Emulation.setFocusEmulationEnabled", {"enabled": True})  # no window has it

    def _call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._loop.run_until_complete(self._exchange(method, params or {}))

    async def _exchange(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        while True:
            reply = await self._receive()
            if reply.get("id") == self._calls:
                break
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return dict(reply["result"])

    async def _until(self, event: str) -> None:
        while not any(e["method"] == event for e in self._events):
            await self._receive()

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json(timeout=CALL_TIMEOUT_S)
        if "method" in message:
            self._events.append(message)
            self._keep(message["method"], message["params"])
        return message

    def _keep(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(_describe(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            if (
                "GL Driver Message (OpenGL, Performance" not in params["entry"]["text"]
            ):  # of reading pixels back
                self.problems.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


def _describe(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details.get("text"))
