"""A conversation with the page whose answers the test says, word by word: requests for text do not leave the browser."""

from __future__ import annotations

import json
from typing import Any

from tests.support.browser import Tab
from tests.support.http_server import RunningServer

# asked: the bodies of the requests. feed(text, reason), done(), lose(): the stream of the latest one.
# refused: what the next request is answered with, as [status, body].
SCRIPT = """
window.asked = [];
window.refused = null;
const really = window.fetch;
window.fetch = async (path, options) => {
  if (!String(path).includes("completions")) return really(path, options);
  asked.push(JSON.parse(options.body));
  if (refused) {
    const [status, body] = refused;
    refused = null;
    return new Response(body, {status});
  }
  let control = null;
  const body = new ReadableStream({start(given) { control = given; }});
  options.signal.addEventListener("abort", () => control.error(new DOMException("", "AbortError")));
  const write = text => control.enqueue(new TextEncoder().encode(`data: ${text}\\n\\n`));
  window.feed = (content, finish_reason = null) => write(JSON.stringify({choices: [{delta: {content}, finish_reason}]}));
  window.done = () => { write("[DONE]"); control.close(); };
  window.lose = () => control.error(new TypeError("network error"));
  return new Response(body);
};
"""
ASKING = "document.getElementById('go').textContent === 'Stop' && window.feed !== undefined"
IDLE = "document.getElementById('go').textContent === 'Send' && document.getElementById('model').textContent !== 'loading'"


def meet(tab: Tab, server: RunningServer, width: int = 1280, height: int = 900, before: str = "") -> None:
    """Open the page. before: a script of the test's that runs ahead."""
    tab.open(f"{server.url}/", width, height, before=SCRIPT + before)
    tab.wait_for(IDLE)


def reload(tab: Tab) -> None:
    """As the user does; what the page keeps is kept."""
    tab.evaluate("window.isOld = true")
    tab.send("Page.reload")
    tab.wait_for(f"window.isOld === undefined && document.readyState === 'complete' && {IDLE}")


def ask(tab: Tab, text: str) -> dict[str, Any]:
    """Write a message and send it, by keys; the request's body."""
    tab.evaluate("window.feed = undefined, document.getElementById('prompt').focus()")
    tab.type(text)
    tab.press("Enter")
    tab.wait_for(ASKING)
    return tab.evaluate("asked.at(-1)")


def answer(tab: Tab, *pieces: str, reason: str = "stop") -> None:
    """The whole answer to the latest request."""
    for piece in pieces:
        tab.evaluate(f"feed({json.dumps(piece)})")
    tab.evaluate(f"feed('', {json.dumps(reason)}), done()")
    tab.wait_for(IDLE)


def text_of(tab: Tab, selector: str) -> list[str]:
    """The text of each element."""
    return tab.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)")


def press_button(tab: Tab, label: str) -> None:
    """The last button that is called so: by its accessible name, or its text."""
    found = f"[...document.querySelectorAll('button')].findLast(b => (b.ariaLabel ?? b.textContent) === {json.dumps(label)})"
    tab.evaluate(f"{found}.focus()")
    tab.press("Enter")
