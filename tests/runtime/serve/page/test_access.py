"""The page by keyboard, by screen reader, in every light and width."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.serve.page.conversing import ASKING, IDLE, answer, ask, meet, press_button, text_of
from tests.support.browser import SHIFT, Tab
from tests.support.http_server import RunningServer, running

RICH = (
    "# Title\n\nSome **bold** `code` and\n\n> a quote\n\n```py\nx = 1"
    + "0" * 300
    + "\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
)
NAMED = {"button", "textbox", "checkbox", "spinbutton", "combobox", "listbox", "link", "DisclosureTriangle"}
# Of every text that is to be seen, its colour's contrast with what lies behind it (WCAG 2.2, 1.4.3), as [ratio, text] where it
# is less than 4.5. Controls that are switched off are exempt there.
FAINT = """
(() => {
  const read = css => {
    const [r, g, b, a = 1] = css.match(/[\\d.]+/g).map(Number);
    return css.startsWith("color(srgb") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((each, i) => each * a + under[i] * (1 - a));
  const behind = element => {
    if (!element) return [255, 255, 255];
    const colour = read(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  const light = colour => {
    const linear = part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map(each => linear(each / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const faint = [];
  const look = (element, css, text) => {
    const under = behind(element), lights = [light(over(read(css), under)), light(under)].sort((a, b) => b - a);
    const ratio = (lights[0] + .05) / (lights[1] + .05);
    if (ratio < 4.5) faint.push([ratio, text]);
    seen++;
  };
  let seen = 0;
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.checkVisibility() || element.disabled) continue;
    const own = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join("").trim();
    if (own) look(element, getComputedStyle(element).color, own);
    if (element.placeholder) look(element, getComputedStyle(element, "::placeholder").color, element.placeholder);
  }
  return [seen, faint];
})()
"""
# The element with the focus: what names it, and whether it is to be seen that it has the focus.
FOCUSED = """
(() => {
  const element = document.activeElement, style = getComputedStyle(element);
  const name = element.id || element.ariaLabel || element.className || element.textContent.trim() || element.tagName;
  return [name, style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2];
})()
"""


@pytest.fixture(scope="module")
def routed(exported: Callable[..., tuple[Path, Path]]) -> Iterator[RunningServer]:
    with running(exported("two_level")[1]) as server:
        yield server


def show_routes(tab: Tab, server: RunningServer, width: int = 1280) -> None:
    query = urllib.parse.urlencode({"prompt": "def add(a, b):\n    return a\n" * 2, "tokens": 12, "trace": 1})
    tab.open(f"{server.url}/?{query}", width)
    tab.wait_for(f"{IDLE} && document.querySelectorAll('.traced span').length > 0")


def test_a_round_trip_by_keyboard_alone(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    assert tab.evaluate("document.activeElement.id") == "prompt"  # where one begins
    tab.type("First line")
    tab.press("Enter", SHIFT)
    tab.type("second")
    tab.press("Enter")
    tab.wait_for(ASKING)
    assert tab.evaluate("asked[0].messages[0].content") == "First line\nsecond"
    answer(tab, RICH)
    assert tab.evaluate("document.activeElement.id") == "prompt"  # the next question can be written at once
    tab.type("More?")
    tab.press("Enter")
    tab.wait_for("asked.length === 2")
    tab.evaluate("feed('Half')")
    tab.press("Escape")
    tab.wait_for(IDLE)
    # All that can be done is reached with Tab, in the order of reading, and shows that it has the focus.
    tab.evaluate("document.getElementById('skip').focus()")
    tab.press("Tab")
    tab.press("Tab", SHIFT)  # back to where Tab begins
    walked: list[str] = []
    for _ in range(60):
        name, is_seen = tab.evaluate(FOCUSED)
        assert is_seen, name
        walked.append(name)
        if name == "go":
            break
        tab.press("Tab")
    order = ["skip", "SUMMARY", "First line second", "new", "rename", "delete", "export", "chat", "system", "temperature"]
    order += ["max_tokens", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty"]
    order += ["turns", "Edit the message", "Copy the code", "Code, py", "Table", "Copy the answer", "Edit the message"]
    order += ["Copy the answer", "Regenerate the answer", "prompt", "go"]
    walked = ["SUMMARY" if name in ("Conversations", "Settings") else name for name in walked]
    assert [name for name in walked if name != "SUMMARY"] == [name for name in order if name != "SUMMARY"]
    assert walked.count("SUMMARY") == 2


def test_an_input_method_is_not_interrupted(server: RunningServer, tab: Tab) -> None:
    """Enter that ends a composition (of Japanese, say) sends nothing."""
    meet(tab, server)
    event = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: %s, bubbles: true, cancelable: true})"
    tab.type("にほん")
    assert tab.evaluate(f"document.getElementById('prompt').dispatchEvent({event % 'true'})")
    assert tab.evaluate("asked.length") == 0
    assert not tab.evaluate(f"document.getElementById('prompt').dispatchEvent({event % 'false'})")
    tab.wait_for("asked.length === 1")


def nodes(tab: Tab) -> list[dict[str, Any]]:
    """The accessibility tree's nodes that a reader meets: role, name, properties."""
    tree = tab.send("Accessibility.getFullAXTree")["nodes"]
    return [
        {
            "role": node["role"]["value"],
            "name": node.get("name", {}).get("value", ""),
            **{each["name"]: each["value"].get("value") for each in node.get("properties", [])},
        }
        for node in tree
        if not node["ignored"]
    ]


def test_the_accessibility_tree(routed: RunningServer, server: RunningServer, tab: Tab) -> None:
    show_routes(tab, routed)
    traced = nodes(tab)
    meet(tab, server)
    ask(tab, "One?")
    answer(tab, RICH)
    chat = nodes(tab)
    for tree in (traced, chat):
        assert [node for node in tree if node["role"] in NAMED and not node["name"].strip()] == []
        roles = [node["role"] for node in tree]
        assert roles.count("banner") == roles.count("main") == roles.count("navigation") == 1
        assert sum(node["role"] == "heading" and node["level"] == 1 for node in tree) == 1
        names = {node["name"] for node in tree if node["role"] == "complementary"}
        assert "Conversations and settings" in names
        assert {node["name"] for node in tree if node["role"] == "article"} >= {"You"}
        assert {node["name"] for node in tree if node["role"] == "region"} == {"Conversation"}
    assert {"Code, py", "Table"} <= {node["name"] for node in chat if node["role"] == "group"}
    assert {"listbox", "option"} <= {node["role"] for node in traced}
    assert any(node["role"] == "option" and node.get("selected") for node in traced)
    assert any(node["name"] == "What a word was chosen from" for node in traced)
    headings = [(node["level"], node["name"]) for node in chat if node["role"] == "heading"]
    assert (3, "Title") in headings and (2, "You") in headings  # an answer's headings lie below its turn's


def test_a_reader_hears_the_answer_once_and_whole(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    tab.evaluate(
        "window.heard = [], new MutationObserver(() => heard.push(document.getElementById('announcer').textContent))"
        ".observe(document.getElementById('announcer'), {childList: true, characterData: true, subtree: true})"
    )
    live = "[...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(e => e.id)"
    assert sorted(tab.evaluate(live)) == ["announcer", "notice", "problem", "reads"]  # none around what streams
    ask(tab, "One?")
    for piece in ("**Yes**", ", ", "`it` ", "is", "."):
        tab.evaluate(f"feed('{piece}')")
    tab.wait_for("document.querySelector('.assistant .body').textContent === 'Yes, it is.'")
    assert tab.evaluate("heard") == ["The model reads."]
    assert tab.evaluate("document.querySelector('.assistant').ariaBusy") == "true"
    answer(tab)
    assert tab.evaluate("heard") == ["The model reads.", "Answer: Yes, it is."]
    assert tab.evaluate("document.querySelector('.assistant').ariaBusy") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(routed: RunningServer, server: RunningServer, tab: Tab, scheme: str) -> None:
    show_routes(tab, routed)
    tab.look_like(prefers_color_scheme=scheme)
    seen, faint = tab.evaluate(FAINT)
    assert seen > 40 and faint == []
    meet(tab, server)
    ask(tab, "One?")
    answer(tab, RICH)
    tab.evaluate("window.refused = [400, '{}']")
    tab.type("Two?")
    tab.press("Enter")
    tab.wait_for("!document.getElementById('problem').hidden")
    tab.look_like(prefers_color_scheme=scheme)
    seen, faint = tab.evaluate(FAINT)
    assert seen > 40 and faint == []
    # The schemes do differ: the page is not one of them painted twice.
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) > 127) == (scheme == "light")


def test_nothing_moves_for_who_does_not_want_it(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, "One?")
    assert tab.evaluate("document.getAnimations().length") == 1
    tab.look_like(prefers_reduced_motion="reduce")
    tab.wait_for("document.getAnimations().length === 0")
    answer(tab, "1.")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out(routed: RunningServer, server: RunningServer, tab: Tab, width: int) -> None:
    """At 320 pixels too, which is a desk's 1280 enlarged four times."""
    meet(tab, server, width, 800)
    ask(tab, "W" * 500)
    answer(tab, RICH + "\n\n" + "X" * 500)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    (end,) = tab.evaluate("[...document.querySelectorAll('#go')].map(each => each.getBoundingClientRect().bottom)")
    assert end <= 800  # what is written next is in reach
    show_routes(tab, routed, width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_what_has_the_focus_is_never_covered(routed: RunningServer, server: RunningServer, tab: Tab) -> None:
    """On a phone, where the message and the routes lie over the page."""
    covered = """
    (() => {
      const element = document.activeElement, box = element.getBoundingClientRect();
      const seen = document.elementFromPoint(box.left + Math.min(box.width / 2, 100), box.top + Math.min(box.height / 2, 20));
      return [element.id || element.ariaLabel || element.textContent, element.contains(seen)];
    })()
    """

    def walk() -> None:
        tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        tab.evaluate("document.getElementById('skip').focus()")
        for _ in range(45):
            tab.press("Tab")
            name, is_seen = tab.evaluate(covered)
            assert is_seen or name == "turns", name  # which is as long as the page
            if name == "go":
                return
        raise AssertionError("Tab did not come to the button")

    meet(tab, server, 390, 844)
    ask(tab, "One?")
    answer(tab, RICH * 3)
    walk()
    press_button(tab, "Delete")
    assert tab.evaluate(covered) == ["undo", True]
    show_routes(tab, routed, 390)
    walk()


def test_the_end_of_a_growing_answer_stays_in_sight(server: RunningServer, tab: Tab) -> None:
    box = "document.getElementById('turns')"
    at_end = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 2"
    meet(tab, server)
    ask(tab, "One?")
    tab.evaluate("feed('line\\n\\n'.repeat(100))")
    tab.wait_for(f"{box}.scrollHeight > 2000 && {at_end}")
    tab.evaluate(f"{box}.scrollTop = 100")  # who reads further up is left there
    tab.evaluate("feed('line\\n\\n'.repeat(100))")
    tab.wait_for("document.querySelectorAll('.body p').length === 200")
    assert tab.evaluate(f"{box}.scrollTop") == 100
    answer(tab)
    assert tab.evaluate(f"{box}.scrollTop") == 100 and text_of(tab, "#go") == ["Send"]
