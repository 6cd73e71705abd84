"""The page at /, looked at in headless Chromium as on a phone and as on a desk.

Where there is no Chromium: only what it refers to.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.http_server import RunningServer, running

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
PROMPT = "def add(a, b):\n    return a + b\n" * 2
DONE = "document.getElementById('go').textContent === 'Generate' && document.querySelectorAll('#answer span').length > 0"


@pytest.fixture(scope="module")
def server(exported: Callable[..., tuple[Path, Path]]) -> Iterator[RunningServer]:
    with running(exported("two_level")[1]) as server:
        yield server


def test_the_page_needs_nothing_from_elsewhere(server: RunningServer) -> None:
    status, headers, content = server.request("GET", "/")
    page = content.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"https?://|@import|url\(|<script src|<link[^>]+href=\"(?!data:)", page)


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(390, 1100), (1280, 900)], ids=["phone", "desktop"])
def test_generating_with_routes(server: RunningServer, tmp_path: Path, width: int, height: int) -> None:
    query = urllib.parse.urlencode({"prompt": PROMPT, "tokens": 12, "trace": 1})

    async def look() -> None:
        async with Browser(tmp_path / "profile") as page:
            await page.open(f"{server.url}/?{query}", width, height)
            await page.wait_for(DONE)
            expected = server.complete(PROMPT, max_tokens=12, routes=True)["choices"][0]
            assert await page.evaluate("document.getElementById('answer').textContent") == expected["text"]
            assert re.search(
                r"^\d+ tokens · first after \d+\.\d\d s · [\d.]+ tokens/s",
                await page.evaluate("document.getElementById('status').textContent"),
            )
            # A word of the answer is chosen; the blocks that it was chosen from are shaded, level 1's underlined.
            await page.evaluate("document.querySelectorAll('#answer span')[3].click()")
            routes = expected["routes"][3]
            blocks = "[...document.querySelectorAll('#blocks .block')]"
            shaded = f"{blocks}.map((b, i) => b.style.background ? i : -1).filter(i => i >= 0)"
            assert await page.evaluate(shaded) == sorted({block for layer in routes["blocks"] for block in layer})
            await page.evaluate("document.getElementById('layer').value = '1'; document.getElementById('layer').onchange()")
            assert await page.evaluate(shaded) == routes["blocks"][1]
            underlined = f"{blocks}.map((b, i) => b.className.includes('candidate') ? i : -1).filter(i => i >= 0)"
            assert await page.evaluate(underlined) == routes["candidates"]
            words = "[...document.querySelectorAll('#blocks .block')].map(b => b.lastChild.textContent).join('')"
            assert (await page.evaluate(words)).startswith(PROMPT)
            assert await page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
            picture = await page.screenshot()
            assert picture.startswith(b"\x89PNG") and _size(picture) == (width, height)
            assert page.problems == []

    asyncio.run(look())


def _size(png: bytes) -> tuple[int, int]:
    width, height = np.frombuffer(png[16:24], ">u4")
    return int(width), int(height)


@needs_chromium
def test_errors_are_shown_and_the_button_stops(server: RunningServer, tmp_path: Path) -> None:
    async def look() -> None:
        async with Browser(tmp_path / "profile") as page:
            await page.open(f"{server.url}/?prompt={'a+' * 400}", 390, 800)
            await page.wait_for("document.getElementById('status').className === 'bad'")
            assert "tokens, but this server holds" not in await page.evaluate("document.getElementById('answer').textContent")
            assert "but this server holds 96 in all" in await page.evaluate("document.getElementById('status').textContent")
            assert await page.evaluate("document.getElementById('go').textContent") == "Generate"

    asyncio.run(look())
    assert server.scheduler.num_active == 0
