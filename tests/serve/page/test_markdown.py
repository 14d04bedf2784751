"""Markdown, run in the browser: what it makes of texts, hostile ones too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page

if TYPE_CHECKING:
    from tests.serve.page.conftest import Stage

CASES = {
    "plain": "<p>plain</p>",
    "two\nlines\n\nnext": "<p>two<br>lines</p><p>next</p>",
    "**b** *i* __b__ _i_ ~~s~~ `c`": (
        "<p><strong>b</strong> <em>i</em> <strong>b</strong> <em>i</em> <s>s</s> <code>c</code></p>"
    ),
    "2 * 3 * 4, snake_case_name, a_b": "<p>2 * 3 * 4, snake_case_name, a_b</p>",
    "***both***": "<p><strong><em>both</em></strong></p>",
    "`` a ` b ``": "<p><code>a ` b</code></p>",
    "\\*no\\*": "<p>*no*</p>",
    "# One\n### Three ###": "<h3>One</h3><h5>Three</h5>",
    "#no heading": "<p>#no heading</p>",
    "- a\n- b\n  - c\n\n1. x\n2. y": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>x</li><li>y</li></ol>",
    "3. three\n\n4. four": '<ol start="3"><li>three</li><li>four</li></ol>',
    "> quoted\n> more": "<blockquote>quoted<br>more</blockquote>",
    "---": "<hr>",
    "a | b\n--|--:\n1 | `x\\|y`": (
        '<div tabindex="0"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr><td>1</td><td class="right"><code>x|y</code></td></tr></tbody></table></div>'
    ),
    "[site](https://example.org/a?b=1&c=2)": '<p><a href="https://example.org/a?b=1&amp;c=2">site</a></p>',
    "see https://example.org/x.": '<p>see <a href="https://example.org/x">https://example.org/x</a>.</p>',
    "![picture](https://example.org/x.png)": '<p><a href="https://example.org/x.png">picture</a></p>',
    "[no](javascript:alert(1)) [no](data:text/html,x) [no](/local)": (
        "<p>[no](javascript:alert(1)) [no](data:text/html,x) [no](/local)</p>"
    ),
    "<b>&amp;</b>": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
}
# Each is long enough that anything quadratic in it takes minutes.
SLOW = ("*a " * 60_000, "[" * 120_000, "`" * 3 + "a" + "` `` " * 40_000, "> " * 60_000, "_a" * 60_000, "**a*" * 40_000)
SLOW_LINES = ("- " * 40_000, "\n".join("  " * n + "- x" for n in range(400)), "| a " * 20_000 + "\n" + "|--" * 20_000)

RENDER = """async (texts) => {
    const { update } = await import("/page/markdown.js");
    const node = document.createElement("div");
    for (const text of texts) update(node, text);
    for (const link of node.querySelectorAll("a")) {
        if (link.target !== "_blank" || link.rel !== "noopener noreferrer") throw new Error("a link that tells");
        link.removeAttribute("target");
        link.removeAttribute("rel");
    }
    return [node.innerHTML, node.textContent];
}"""


@pytest.fixture(scope="module")
def page(visit: Callable[..., AbstractContextManager[Stage]], stand: tuple[str, object]) -> Iterator[Page]:
    with visit(stand[0]) as stage:
        yield stage.page


def rendered(page: Page, *texts: str) -> str:
    return page.evaluate(RENDER, list(texts))[0]


@pytest.mark.parametrize("source", CASES)
def test_markdown(page: Page, source: str) -> None:
    assert rendered(page, source).replace(' class="table"', "") == CASES[source]


def test_code_keeps_every_character(page: Page) -> None:
    code = "if a < b:\n\n\tprint('*x*', `y`)  \n~~~"
    html, text = page.evaluate(RENDER, [f"````py x\n{code}\n````\nafter"])
    assert text == f"pyCopy{code}after"
    assert html.startswith('<figure class="code">')
    assert "<p>after</p>" in html
    assert page.evaluate(RENDER, [f"```\n{code}"])[1] == f"Copy{code}"  # not closed yet


@given(st.text(alphabet="ab *_`#->|[]()~\\\n1.:/!h", max_size=60), st.integers(1, 7))
@settings(max_examples=40)
def test_an_answer_that_grows_ends_as_one_that_was_there_at_once(page: Page, text: str, step: int) -> None:
    prefixes = [text[:end] for end in range(0, len(text), step)]
    assert rendered(page, *prefixes, text) == rendered(page, text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Z"]), max_size=40))
@settings(max_examples=40)
def test_letters_are_never_lost(page: Page, text: str) -> None:
    shown = page.evaluate(RENDER, [text])[1]
    assert [c for c in shown if c.isalnum()] == [c for c in text if c.isalnum()] or text[0].isdigit()


@pytest.mark.parametrize("text", [*SLOW, *SLOW_LINES], ids=range(len(SLOW) + len(SLOW_LINES)))
def test_no_text_takes_long(page: Page, text: str) -> None:
    start = time.monotonic()
    rendered(page, text)
    assert time.monotonic() - start < 3
