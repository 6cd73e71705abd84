"""Conversations on the page: asked, stopped, edited, kept; and the browser or the network does not do its part."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.serve.page.conversing import ASKING, IDLE, answer, ask, meet, press_button, reload, text_of
from tests.support.browser import Tab
from tests.support.http_server import RunningServer

REFUSED = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('', 'SecurityError'); }});"
FULL = "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); };"


def turns(tab: Tab) -> list[str]:
    return text_of(tab, ".turn .body")


def roles(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_settings_and_history_reach_the_request(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    given = {
        "temperature": 0.7,
        "max_tokens": 64,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
    }
    for name, value in {**given, "system": "Be short"}.items():
        tab.evaluate(f"document.getElementById('{name}').value = {json.dumps(str(value))}")
    first = ask(tab, "One?")
    assert {name: first[name] for name in given} == given
    assert roles(first) == [("system", "Be short"), ("user", "One?")]
    answer(tab, "1", ".")
    assert roles(ask(tab, "Two?")) == [("system", "Be short"), ("user", "One?"), ("assistant", "1."), ("user", "Two?")]
    answer(tab, "2.")
    for name in given:  # what is left empty is the server's to say
        tab.evaluate(f"document.getElementById('{name}').value = ''")
    bare = ask(tab, "Three?")
    assert set(bare) == {"model", "messages", "max_tokens", "stream"} and bare["max_tokens"] == -1
    answer(tab, "3.")
    assert turns(tab) == ["One?", "1.", "Two?", "2.", "Three?", "3."] and tab.page.problems == []


def test_every_request_of_the_page_is_one_that_the_server_takes(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k", "seed"):
        tab.evaluate(f"document.getElementById('{name}').value = 1")
    body = ask(tab, "One?")
    status, _, told = server.request("POST", "/v1/chat/completions", {**body, "stream": False, "max_tokens": 2})
    assert status == 200, told
    answer(tab, "1.")


def test_a_setting_out_of_range_is_not_sent(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    tab.evaluate("document.getElementById('settings').open = false, document.getElementById('top_p').value = 3")
    tab.evaluate("document.getElementById('prompt').focus()")
    tab.type("One?")
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'top_p'")  # with the browser's words about what it may be
    assert tab.evaluate("asked.length") == 0 and tab.evaluate("document.getElementById('prompt').value") == "One?"


def test_stopping_keeps_what_came(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "One?")
    tab.evaluate("feed('Half an '), feed('answer')")
    tab.wait_for("document.querySelector('.assistant .body').textContent === 'Half an answer'")
    tab.press("Escape")
    tab.wait_for(IDLE)
    assert turns(tab) == ["One?", "Half an answer"] and text_of(tab, ".assistant .note") == ["stopped"]
    reload(tab)
    assert turns(tab) == ["One?", "Half an answer"] and text_of(tab, ".assistant .note") == ["stopped"]
    # Stopped before a word came, the question stands alone, and the next one goes along with it.
    ask(tab, "Two?")
    press_button(tab, "Stop")
    tab.wait_for(IDLE)
    assert turns(tab) == ["One?", "Half an answer", "Two?"]
    assert roles(ask(tab, "Three?"))[-1] == ("user", "Two?\n\nThree?")
    answer(tab, "3.")


def test_a_lost_connection_keeps_what_came_and_can_be_tried_again(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "One?")
    tab.evaluate("feed('Half')")
    tab.evaluate("lose()")
    tab.wait_for(IDLE)
    assert turns(tab) == ["One?", "Half"] and "connection to the server was lost" in text_of(tab, "#problem-text")[0]
    press_button(tab, "Try again")
    tab.wait_for(ASKING)
    assert roles(tab.evaluate("asked.at(-1)")) == [("user", "One?")]
    answer(tab, "Whole.")
    assert turns(tab) == ["One?", "Whole."] and tab.evaluate("document.getElementById('problem').hidden")
    # A stream that ends without saying so was cut off as well.
    ask(tab, "Two?")
    tab.evaluate("feed('Ha'), Promise.resolve().then(() => window.lose())")
    tab.wait_for(f"{IDLE} && !document.getElementById('problem').hidden")


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (429, '{"error": {"message": "the queue is full; try again in 3 s"}}', "the queue is full; try again in 3 s"),
        (502, "<html>Bad gateway</html>", "The server answered with status 502 and no reason; try again."),
        (400, '{"error": "no object"}', "The server answered with status 400 and no reason; try again."),
        (400, '{"error": {"message": "<b onclick=x>"}}', "<b onclick=x>"),
    ],
)
def test_errors_are_text(server: RunningServer, tab: Tab, status: int, body: str, shown: str) -> None:
    meet(tab, server)
    tab.evaluate(f"window.refused = [{status}, {json.dumps(body)}], document.getElementById('prompt').focus()")
    tab.type("One?")
    tab.press("Enter")
    tab.wait_for("!document.getElementById('problem').hidden")
    assert text_of(tab, "#problem-text") == [shown] and turns(tab) == ["One?"]


def test_a_server_that_is_gone_is_found_again(server: RunningServer, tab: Tab) -> None:
    tab.open(
        f"{server.url}/", before="const f = fetch; window.fetch = (...a) => window.back ? f(...a) : Promise.reject(TypeError())"
    )
    tab.wait_for("!document.getElementById('problem').hidden")
    assert text_of(tab, "#problem-text") == ["The server does not answer. Look whether it still runs, then try again."]
    tab.evaluate("window.back = true")
    press_button(tab, "Try again")
    tab.wait_for(IDLE + " && document.getElementById('problem').hidden && document.getElementById('model').textContent !== ''")


def test_regenerating_and_editing(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "One?")
    answer(tab, "1.")
    press_button(tab, "Regenerate the answer")
    tab.wait_for("asked.length === 2")
    assert tab.evaluate("JSON.stringify(asked[0]) === JSON.stringify(asked[1])")
    answer(tab, "I.")
    ask(tab, "Two?")
    answer(tab, "2.")
    assert turns(tab) == ["One?", "I.", "Two?", "2."]
    tab.evaluate("document.querySelector('.user [aria-label=\"Edit the message\"]').click()")
    assert tab.evaluate("document.activeElement.value") == "One?"
    tab.press("Escape")  # nothing has changed
    assert turns(tab) == ["One?", "I.", "Two?", "2."] and tab.evaluate("document.activeElement.textContent") == "Edit"
    tab.press("Enter")
    tab.type(" Really")
    tab.press("Enter")
    tab.wait_for("asked.length === 4")
    assert roles(tab.evaluate("asked.at(-1)")) == [("user", "One? Really")]
    answer(tab, "Yes.")
    assert turns(tab) == ["One? Really", "Yes."]


def test_copying(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    tab.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    whole = "Use this:\n\n```python\nprint('<b>')\n```\n\n**Done**"
    ask(tab, "One?")
    answer(tab, whole)
    press_button(tab, "Copy the code")
    tab.wait_for("navigator.clipboard.readText().then(text => text === \"print('<b>')\")")
    press_button(tab, "Copy the answer")
    tab.wait_for(f"navigator.clipboard.readText().then(text => text === {json.dumps(whole)})")
    # As over plain HTTP from another machine, where there is no navigator.clipboard.
    tab.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined}), document.execCommand = () => false")
    press_button(tab, "Copy the code")
    tab.wait_for("document.getElementById('problem-text').textContent.includes('copy it yourself')")


def test_several_conversations_outlive_the_page(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "About cats")
    answer(tab, "Meow.")
    press_button(tab, "New")
    assert turns(tab) == [] and tab.evaluate("document.activeElement.id") == "prompt"
    ask(tab, "About dogs")
    answer(tab, "Woof.")
    reload(tab)
    listed = "#conversations button"
    assert text_of(tab, listed) == ["About dogs", "About cats"] and turns(tab) == ["About dogs", "Woof."]
    press_button(tab, "About cats")
    assert turns(tab) == ["About cats", "Meow."]
    press_button(tab, "Rename")
    tab.type("<i>Felines</i>")
    tab.press("Enter")
    assert text_of(tab, listed) == ["About dogs", "<i>Felines</i>"]
    reload(tab)
    assert text_of(tab, listed) == ["About dogs", "<i>Felines</i>"]
    press_button(tab, "<i>Felines</i>")
    press_button(tab, "Delete")
    assert text_of(tab, listed) == ["About dogs"] and text_of(tab, "#notice-text") == ["Deleted “<i>Felines</i>”."]
    press_button(tab, "Undo")
    assert text_of(tab, listed) == ["About dogs", "<i>Felines</i>"] and turns(tab) == ["About cats", "Meow."]
    press_button(tab, "Delete")
    reload(tab)
    assert text_of(tab, listed) == ["About dogs"]


def test_deleting_what_is_being_answered_leaves_nothing(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "One?")
    tab.evaluate("feed('Half')")
    press_button(tab, "Delete")
    tab.wait_for(IDLE)
    assert tab.evaluate("localStorage.length") == 0 and turns(tab) == []


def test_export(server: RunningServer, tab: Tab, tmp_path: Path) -> None:
    meet(tab, server)
    tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.evaluate("document.getElementById('system').value = 'Be short'")
    ask(tab, "One?")
    answer(tab, "1 ", "🦊", reason="length")
    press_button(tab, "Export")
    path, end = tmp_path / "conversations.json", time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        tab.wait_for("new Promise(resolve => setTimeout(() => resolve(true), 50))")
    (conversation,) = json.loads(path.read_text(encoding="utf-8"))["conversations"]
    assert conversation["settings"]["system"] == "Be short" and conversation["title"] == "One?"
    assert conversation["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1 🦊", "end": "length"},
    ]


@pytest.mark.parametrize(
    ("before", "told"),
    [(REFUSED, "This browser keeps nothing"), (FULL, "The browser's storage is full")],
    ids=["refused", "full"],
)
def test_the_page_works_where_nothing_can_be_kept(server: RunningServer, tab: Tab, before: str, told: str) -> None:
    meet(tab, server, before=before)
    ask(tab, "About cats")
    answer(tab, "Meow.")
    press_button(tab, "New")
    ask(tab, "About dogs")
    answer(tab, "Woof.")
    press_button(tab, "About cats")
    assert turns(tab) == ["About cats", "Meow."]
    assert told in text_of(tab, "#kept")[0]
    press_button(tab, "Delete")
    assert text_of(tab, "#conversations button") == ["About dogs"] and tab.page.problems == []


def test_garbage_in_the_storage_is_left_alone(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "About cats")
    answer(tab, "Meow.")
    garbage = [
        "",
        "{",
        "null",
        "[1]",
        "7",
        '{"turns": 5}',
        '{"turns": [null]}',
        '{"turns": [{"role": "system", "content": ""}]}',
    ]
    garbage += ['{"turns": [{"role": "user", "content": 5}]}', '{"turns": []}', '{"__proto__": {"turns": []}}']
    for place, text in enumerate(garbage):
        tab.evaluate(f"localStorage.setItem('bilevel:conversation:x{place}', {json.dumps(text)})")
    odd = {
        "title": 5,
        "changed": "x",
        "settings": {"top_p": [], "temperature": "0.5"},
        "turns": [{"role": "user", "content": "Odd"}],
    }
    tab.evaluate(f"localStorage.setItem('bilevel:conversation:odd', {json.dumps(json.dumps(odd))})")
    reload(tab)
    assert text_of(tab, "#conversations button") == ["About cats", "Odd"] and turns(tab) == ["About cats", "Meow."]
    press_button(tab, "Odd")
    assert turns(tab) == ["Odd"] and tab.evaluate("document.getElementById('temperature').value") == "0.5"
    assert tab.evaluate("localStorage.length") == len(garbage) + 2 and tab.page.problems == []
