"""Headless Chromium over its DevTools protocol: open a page at a width, look at it, press things, take a picture."""

from __future__ import annotations

import asyncio
import base64
import shutil
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
SHIFT = 8


class Page:
    """One tab. problems: what the page's console complained of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.problems: list[str] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(str(message["params"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, expression: str, seconds: float = 60) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not await self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} did not come true"
            await asyncio.sleep(0.05)

    async def open(self, url: str, width: int, height: int) -> None:
        """Go to ``url`` in a window of this size."""
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.send("Page.navigate", url=url)
        await self.wait_for("document.readyState === 'complete'")

    async def screenshot(self) -> bytes:
        """What is to be seen, as PNG."""
        return base64.b64decode((await self.send("Page.captureScreenshot", format="png"))["data"])


class Tab:
    """A page for tests that take one step after another: each method waits for what it does."""

    def __init__(self, page: Page, loop: asyncio.AbstractEventLoop) -> None:
        self.page, self._loop, self._scripts = page, loop, list[str]()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        return self._loop.run_until_complete(self.page.send(method, **params))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self._loop.run_until_complete(self.page.evaluate(expression))

    def wait_for(self, expression: str) -> None:
        """Until the expression is true."""
        self._loop.run_until_complete(self.page.wait_for(expression))

    def open(self, url: str, width: int = 1280, height: int = 900, *, before: str = "") -> None:
        """Go to ``url`` as somebody who was never there. before: a script that runs ahead of the page's own."""
        for script in self._scripts:
            self.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        self.send("Page.navigate", url="about:blank")
        self.send("Storage.clearDataForOrigin", origin="/".join(url.split("/")[:3]), storageTypes="all")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        self.look_like()
        self.send("Page.enable")
        script = self.send("Page.addScriptToEvaluateOnNewDocument", source=before)
        self._scripts = [script["identifier"]]
        self._loop.run_until_complete(self.page.open(url, width, height))
        self.page.problems.clear()

    def look_like(self, **features: str) -> None:
        """Media features, as in prefers_color_scheme="dark"; those not named are the browser's own."""
        asked = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=asked)

    def press(self, key: str, modifiers: int = 0) -> None:
        """One key, down and up."""
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.send("Input.insertText", text=text)

    def screenshot(self) -> bytes:
        """What is to be seen, as PNG."""
        return self._loop.run_until_complete(self.page.screenshot())


@contextmanager
def open_tab(folder: Path) -> Iterator[Tab]:
    """A browser with one tab; folder: an empty one for its profile."""
    loop = asyncio.new_event_loop()
    browser = Browser(folder)
    try:
        yield Tab(loop.run_until_complete(browser.__aenter__()), loop)
    finally:
        loop.run_until_complete(browser.__aexit__())
        loop.close()


class Browser:
    """``async with Browser(folder) as page:``; folder: an empty one for its profile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def __aenter__(self) -> Page:
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL)
        active, end = self._folder / "DevToolsActivePort", time.monotonic() + 60
        while not active.exists() or not active.read_text(encoding="ascii").strip():
            assert time.monotonic() < end and self._process.returncode is None, "Chromium did not start"
            await asyncio.sleep(0.05)
        port = active.read_text(encoding="ascii").splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
            tabs = await response.json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        return Page(self._socket)

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._session.close()
        self._process.terminate()
        await asyncio.wait_for(self._process.wait(), 30)
