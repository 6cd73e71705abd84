"""A model's Markdown on the page: what it says is shown, and nothing that it says is done."""

from __future__ import annotations

import json
import random

import pytest

from tests.runtime.serve.page.conversing import answer, ask, meet, text_of
from tests.support.browser import Tab
from tests.support.http_server import RunningServer

# The elements that a text becomes, as nested lists of a name and children, without the bars over code.
SHAPE = """
import("/page/markdown.js").then(({render}) => {
  const box = document.createElement("div");
  render(box, %s);
  const shape = node => node.nodeType === 3 ? node.data
    : node.className === "code" ? ["code", node.firstChild.firstChild.textContent, node.querySelector("code").textContent]
    : [node.tagName.toLowerCase(), ...[...node.childNodes].map(shape)];
  return [...box.childNodes].map(shape);
})
"""


@pytest.fixture(scope="module")
def page(server: RunningServer, tab: Tab) -> Tab:
    meet(tab, server)
    return tab


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("plain", [["p", "plain"]]),
        ("one\ntwo\n\nthree", [["p", "one\ntwo"], ["p", "three"]]),
        ("a **b** c", [["p", "a ", ["strong", "b"], " c"]]),
        ("**b *c* d**", [["p", ["strong", "b ", ["em", "c"], " d"]]]),
        ("***b***", [["p", ["strong", ["em", "b"]]]]),
        ("_a_ snake_case_name 2*3*4 ~~x~~", [["p", ["em", "a"], " snake_case_name 2*3*4 ", ["del", "x"]]]),
        ("a ** b ** and **open", [["p", "a ** b ** and **open"]]),
        (r"\*no\* and `**code** \*`", [["p", "*no* and ", ["code", r"**code** \*"]]]),
        ("`` a`b ``", [["p", ["code", "a`b"]]]),
        ("# One\n### Two #", [["h3", "One"], ["h5", "Two #"]]),
        ("#hashtag", [["p", "#hashtag"]]),
        ("- a\n- **b**\n\nc", [["ul", ["li", "a"], ["li", ["strong", "b"]]], ["p", "c"]]),
        ("3. a\n4. b", [["ol", ["li", "a"], ["li", "b"]]]),
        ("- a\n  - b\n    - c\n- d", [["ul", ["li", "a", ["ul", ["li", "b", ["ul", ["li", "c"]]]]], ["li", "d"]]]),
        ("1. a\n   ```py\n   x\n     y\n   ```\n2. b", [["ol", ["li", "a", ["code", "py", "x\n  y"]], ["li", "b"]]]),
        ("* a\n1. b", [["ul", ["li", "a"]], ["ol", ["li", "b"]]]),
        ("before\n- a", [["p", "before"], ["ul", ["li", "a"]]]),
        ("```\na\n\n b\n```\nc", [["code", "code", "a\n\n b"], ["p", "c"]]),
        ("```js\nopen", [["code", "js", "open"]]),
        ("~~~\n```\n~~~", [["code", "code", "```"]]),
        ("````\n```\n````", [["code", "code", "```"]]),
        ("> a\n> - b", [["blockquote", ["p", "a"], ["ul", ["li", "b"]]]]),
        ("a\n\n---\n\nb", [["p", "a"], ["hr"], ["p", "b"]]),
        (
            "| a | b |\n|---|:-:|\n| 1 | **2** |",
            [
                [
                    "div",
                    [
                        "table",
                        ["thead", ["tr", ["th", "a"], ["th", "b"]]],
                        ["tbody", ["tr", ["td", "1"], ["td", ["strong", "2"]]]],
                    ],
                ]
            ],
        ),
        ("a | b", [["p", "a | b"]]),
        # What could be done is shown instead.
        ("<b>x</b> &lt;", [["p", "<b>x</b> &lt;"]]),
        ("[x](javascript:alert(1)) ![y](//e.example/z)", [["p", "[x](javascript:alert(1)) ![y](//e.example/z)"]]),
    ],
)
def test_blocks_and_emphasis(page: Tab, text: str, shape: list[object]) -> None:
    assert page.evaluate(SHAPE % json.dumps(text)) == shape


ATTACKS = [
    "<script>window.bad = 1</script>",
    "<img src=x onerror='window.bad = 1'>",
    "```<script>window.bad = 1</script>\n<script>window.bad = 1</script>\n```",
    "# <svg onload='window.bad = 1'>",
    "- <iframe srcdoc='<script>parent.bad = 1</script>'></iframe>",
    "[x](javascript:window.bad=1) <javascript:window.bad=1>",
    "| <script>window.bad = 1</script> |\n|---|\n| <style>*{display:none}</style> |",
]


def test_a_script_tag_in_an_answer_stays_text(server: RunningServer, tab: Tab) -> None:
    meet(tab, server)
    ask(tab, ATTACKS[0])
    answer(tab, *"\n\n".join(ATTACKS).splitlines(keepends=True))
    shown = "".join(text_of(tab, "#turns"))
    for part in (
        "<script>window.bad = 1</script>",
        "onerror=",
        "<svg onload",
        "<iframe srcdoc",
        "javascript:window",
        "<style>",
    ):
        assert part in shown
    dangerous = "script, img, svg, iframe, style, a, form form, object, embed, link"
    assert tab.evaluate(f"document.querySelectorAll('#turns :is({dangerous})').length") == 0
    assert tab.evaluate("window.bad") is None and tab.page.problems == []
    # And should a mistake ever write markup: the browser refuses it.
    assert "TrustedHTML" in tab.evaluate("(() => { try { document.body.innerHTML = '<b>' } catch (e) { return e.message } })()")


def test_any_text_is_shown_whole_and_soon(page: Tab) -> None:
    """Letters are never lost, whatever stands between them, however deep; nothing takes long."""
    draw = random.Random(0)
    pieces = [
        "a",
        "b ",
        "*",
        "**",
        "_",
        "`",
        "```",
        "~~~\n",
        "\n",
        "\n\n",
        "- ",
        "1. ",
        "> ",
        "  ",
        "\t",
        "# ",
        "|",
        "|-|-|\n",
        "\\",
        "漢",
        "🦊",
    ]
    texts = ["".join(draw.choices(pieces, k=60)) for _ in range(150)]
    marks = (
        "*a ",
        "`a",
        "**a ",
        "*a **b ",
        "~~a ",
        "_a ",
        "> ",
        "- ",
        "| ",
        "**",
        "# ",
        "- a\n ",
        "> a\n",
        "a|\n",
        "```\n",
        "1. ",
    )
    # Paragraphs are looked into up to 20,000 characters.
    texts += [mark * (size // len(mark)) for mark in marks for size in (19_900, 60_000)]
    texts += ["".join(" " * (2 * depth) + "- a\n" for depth in range(300)), ">" * 5000 + "a"]
    found = page.evaluate(
        f"""import("/page/markdown.js").then(({{render}}) => {json.dumps(texts)}.map(text => {{
          const box = document.createElement("div"), start = performance.now();
          render(box, text);
          const seconds = (performance.now() - start) / 1000;
          for (const bar of box.querySelectorAll(".bar span, .bar button")) bar.classList.contains("copy-code") && bar.remove();
          return [seconds, [...box.textContent].filter(letter => /[ab漢🦊]/u.test(letter)).length];
        }}))"""
    )
    for text, (seconds, letters) in zip(texts, found, strict=True):
        assert letters >= sum(letter in "ab漢🦊" for letter in text), text[:200]
        assert seconds < (2 if len(text) < 20_000 else 5), (seconds, text[:50])  # some tenths where nothing else runs


def test_a_text_that_grows_ends_as_if_it_had_come_at_once(page: Tab) -> None:
    text = "# T\n\nA **bold** word\n- a\n  - b\n\n```py\nx = 1\n\ny\n```\n\n| a |b\n|-|-|\n| 1 | 2 |\n\n> q\n\nend `c`"
    is_same = page.evaluate(
        f"""import("/page/markdown.js").then(({{render}}) => {{
          const text = {json.dumps(text)}, grown = document.createElement("div");
          for (let end = 0; end <= text.length; end++) {{
            render(grown, text.slice(0, end));
            const fresh = document.createElement("div");
            render(fresh, text.slice(0, end));
            if (!fresh.isEqualNode(grown)) return text.slice(0, end);
          }}
          const first = grown.firstChild;
          render(grown, text + " more");
          return first === grown.firstChild;  // what did not change is the same element, with what is selected in it
        }})"""
    )
    assert is_same is True
