"""The page with a real server behind it: its files, its requests, the routes it draws."""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bilevel.runtime.serve.page.files import FILES
from tests.runtime.serve.page.conversing import IDLE, text_of
from tests.support.browser import Tab
from tests.support.http_server import NAME, RunningServer, running

PROMPT = "def add(a, b):\n    return a + b\n" * 2
WORDS = "[...document.querySelectorAll('.traced span')]"


@pytest.fixture(scope="module")
def routed(exported: Callable[..., tuple[Path, Path]]) -> Iterator[RunningServer]:
    """A model that gives its routes and has no chat template."""
    with running(exported("two_level")[1]) as server:
        yield server


def test_the_page_needs_nothing_from_elsewhere(server: RunningServer) -> None:
    status, headers, content = server.request("GET", "/")
    page = content.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    used = {f"/{name}" for name in re.findall(r"(?:src|href)=\"(page/[^\"]+)\"", page)}
    kinds = {".css": "text/css", ".js": "text/javascript", "": "text/html"}
    for address in FILES:
        status, headers, content = server.request("GET", address)
        text = content.decode()
        assert status == 200 and headers["content-type"].startswith(kinds[Path(address).suffix])
        assert not re.search(r"https?://|@import|url\(", text)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"on", text
        )
        used |= {f"/page/{name}" for name in re.findall(r"from \"\./(.+?)\"", text)}
    assert used == set(FILES) - {"/"}  # nothing is missing, nothing left over
    assert server.request("GET", "/page/nothing.js")[0] == 404


@pytest.mark.parametrize(("width", "height"), [(390, 1100), (1280, 900)], ids=["phone", "desktop"])
def test_generating_with_routes(routed: RunningServer, tab: Tab, width: int, height: int) -> None:
    query = urllib.parse.urlencode({"prompt": PROMPT, "tokens": 12, "trace": 1})
    tab.open(f"{routed.url}/?{query}", width, height)
    tab.wait_for(f"{IDLE} && {WORDS}.length > 0")
    expected = routed.complete(PROMPT, max_tokens=12, routes=True)["choices"][0]
    assert "".join(text_of(tab, ".traced span")) == expected["text"]
    assert re.search(r"^\d+ tokens · first after \d+\.\d\d s · [\d.]+ tokens/s", text_of(tab, "#status")[0])
    # A word of the answer is chosen; the blocks that it was chosen from are shaded, level 1's underlined.
    tab.evaluate(f"{WORDS}[3].click()")
    routes = expected["routes"][3]
    shaded = "[...document.querySelectorAll('#blocks .block')].map((b, i) => b.style.length ? i : -1).filter(i => i >= 0)"
    read = sorted({block for layer in routes["blocks"] for block in layer})
    assert tab.evaluate(shaded) == read
    assert [int(block) for block in re.findall(r"block (\d+) in", text_of(tab, "#reads")[0])] == read
    tab.evaluate("document.getElementById('layer').value = '1'; document.getElementById('layer').onchange()")
    assert tab.evaluate(shaded) == routes["blocks"][1]
    blocks = "[...document.querySelectorAll('#blocks .block')]"
    underlined = f"{blocks}.map((b, i) => b.className.includes('candidate') ? i : -1).filter(i => i >= 0)"
    assert tab.evaluate(underlined) == routes["candidates"]
    assert tab.evaluate(f"{blocks}.map(b => b.lastChild.textContent).join('')").startswith(PROMPT)
    # The arrow keys walk through the words, and only one of them is in the order of Tab.
    tab.press("ArrowRight")
    tab.press("End")
    assert tab.evaluate(f"{WORDS}.indexOf(document.activeElement)") == len(expected["routes"]) - 1
    tab.press("Home")
    assert tab.evaluate(f"{WORDS}.map(w => [w.ariaSelected, w.tabIndex]).findIndex(w => w[0] === 'true' && w[1] === 0)") == 0
    assert tab.evaluate(f"{WORDS}.filter(w => w.tabIndex === 0).length") == 1
    assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert tab.evaluate("location.search") == ""  # read again, it does not generate again
    picture = tab.screenshot()
    assert picture.startswith(b"\x89PNG") and tuple(np.frombuffer(picture[16:24], ">u4")) == (width, height)
    assert tab.page.problems == []


def test_text_goes_on_where_there_is_no_template(routed: RunningServer, tab: Tab) -> None:
    tab.open(f"{routed.url}/?{urllib.parse.urlencode({'prompt': PROMPT, 'tokens': 4})}")
    tab.wait_for(f"{IDLE} && document.querySelectorAll('.assistant').length === 1")
    assert tab.evaluate("document.getElementById('systems').hidden && document.getElementById('chatting').hidden")
    tab.press("Enter")  # nothing more is said: the model goes on
    tab.wait_for(f"{IDLE} && document.querySelectorAll('.assistant').length === 2")
    first, second = text_of(tab, ".assistant .body")
    assert first == routed.complete(PROMPT, max_tokens=4)["choices"][0]["text"]
    assert second == routed.complete(PROMPT + first, max_tokens=4)["choices"][0]["text"]


def test_errors_are_shown_with_their_remedy_and_the_question_is_kept(routed: RunningServer, tab: Tab) -> None:
    tab.open(f"{routed.url}/?prompt={'a%2B' * 400}", 390, 800)
    tab.wait_for("!document.getElementById('problem').hidden")
    assert "but this server holds 96 tokens" in text_of(tab, "#problem-text")[0]
    assert text_of(tab, ".turn .body") == ["a+" * 400] and text_of(tab, "#go") == ["Send"]
    assert routed.scheduler.num_active == 0


def test_a_chat_reaches_the_model_with_its_system_prompt(server: RunningServer, tab: Tab) -> None:
    tab.open(f"{server.url}/")
    tab.wait_for(IDLE)
    tab.evaluate("document.getElementById('system').value = 'Be short', document.getElementById('max_tokens').value = 5")
    tab.evaluate("document.getElementById('prompt').focus()")
    tab.type("Hello")
    tab.press("Enter")
    tab.wait_for(f"{IDLE} && document.querySelectorAll('.assistant').length === 1")
    messages = [{"role": "system", "content": "Be short"}, {"role": "user", "content": "Hello"}]
    body = {"model": NAME, "messages": messages, "max_tokens": 5, "temperature": 0}
    status, _, expected = server.request("POST", "/v1/chat/completions", body)
    (kept,) = tab.evaluate("Object.keys(localStorage).map(key => JSON.parse(localStorage[key]))")
    assert status == 200
    assert [turn["content"] for turn in kept["turns"]] == ["Hello", expected["choices"][0]["message"]["content"]]


def test_stopping_frees_the_server(server: RunningServer, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    step, turns = server.scheduler.step, threading.Semaphore(3)
    monkeypatch.setattr(server.scheduler, "step", lambda: (turns.acquire(), step()))
    tab.open(f"{server.url}/")
    tab.wait_for(IDLE)
    tab.type("Hello")
    tab.press("Enter")
    tab.wait_for("document.getElementById('status').textContent.includes('token')")
    tab.press("Escape")
    tab.wait_for(IDLE)
    turns.release(1000)
    shown = text_of(tab, ".assistant .tools")
    assert len(shown) == 1 and shown[0].startswith("stopped")
    for _ in range(500):
        if server.scheduler.num_active == 0:
            break
        threading.Event().wait(0.01)
    assert server.scheduler.num_active == 0


def test_a_key_is_asked_for_and_not_kept(chat_bundle: Path, tab: Tab, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key\n", encoding="utf-8")
    with running(chat_bundle, keys=keys) as server:
        tab.open(f"{server.url}/")
        tab.wait_for("!document.getElementById('locked').hidden")
        assert "This server asks for an API key" in text_of(tab, "#problem-text")[0]
        assert tab.evaluate("document.activeElement.id") == "key"
        tab.type("secret-key")
        tab.press("Enter")
        tab.wait_for(f"{IDLE} && document.getElementById('model').textContent.startsWith('{NAME}')")
        tab.evaluate("document.getElementById('max_tokens').value = 3, document.getElementById('prompt').focus()")
        tab.type("Hello")
        tab.press("Enter")
        tab.wait_for("document.querySelectorAll('.assistant .tools').length === 1")
        assert tab.evaluate("document.getElementById('problem').hidden")
        assert "secret-key" not in tab.evaluate("JSON.stringify({...localStorage})")
