"""Pieces of a self-contained HTML page: escaping, sections, pictures, tables, and the page around them.

Functions return HTML. Arguments called `body` or `cells` are HTML already; every other text is escaped here, and a
number stands in a `<data value="...">`, exact for a program and rounded for the eye. The page loads nothing and runs no
script.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def text(value: str) -> str:
    """Any text: markup escaped, control characters made visible, what UTF-8 cannot hold replaced."""
    visible = value.translate(_CONTROL_PICTURES).encode("utf8", "replace").decode("utf8")
    return html.escape(visible)


def number(value: float, write: Callable[[Any], str]) -> str:
    """A number with its exact value beside the written one."""
    return f'<data value="{value!r}">{text(write(value))}</data>'


def section(heading: str, introduction: str, body: str) -> str:
    paragraph = f"<p>{text(introduction)}</p>" if introduction else ""
    return f'<section id="{anchor(heading)}"><h2>{text(heading)}</h2>{paragraph}{body}</section>\n'


def anchor(heading: str) -> str:
    """The name by which a link finds a section."""
    return heading.lower().replace(" ", "-")


def header(title: str, body: str, headings: Iterable[str]) -> str:
    """The title, the page in a sentence or two, and links to the sections."""
    links = "".join(f'<a href="#{anchor(heading)}">{text(heading)}</a>' for heading in headings)
    return (
        f'<header>\n<h1>{text(title)}</h1>\n<p class="lede">{body}</p>\n'
        f'<nav aria-label="Sections">{links}</nav>\n</header>\n'
    )


def picture(heading: str, svg: str, alt: str, how_to_read: str) -> str:
    """A chart; alt says in words what it shows, for those who do not see it."""
    return (
        f'<figure><h3>{text(heading)}</h3><div role="img" aria-label="{text(alt)}">{svg}</div>'
        f"<figcaption>{text(how_to_read)}</figcaption></figure>"
    )


def side_by_side(*bodies: str) -> str:
    """Pictures in two columns, or one below the other on a narrow screen."""
    return f'<div class="pictures">{"".join(bodies)}</div>'


def tile(label: str, body: str, note: str) -> str:
    """One headline number with its name above and its unit below."""
    return f'<div><dt>{text(label)}</dt><dd class="number">{body}</dd><dd class="note">{text(note)}</dd></div>'


def tiles(bodies: Iterable[str]) -> str:
    return f'<section aria-label="Headline numbers"><dl class="tiles">{"".join(bodies)}</dl></section>\n'


def table(caption: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls sideways where it is too wide. rows: (name, cells)."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (
        f'<div class="table"><h3>{text(caption)}</h3><div role="region" aria-label="{text(caption)}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


CONTINUED_KEY = (
    '<p class="key"><span class="prompt">Grey is the prompt</span>, '
    '<span class="continuation">coloured is what the model wrote</span>.</p>'
)


def continued(source: str, prompt: str, continuation: str) -> str:
    """A text from somewhere, and how a model went on with it."""
    return (
        f'<article class="sample"><h3>{text(source)}</h3><pre><span class="prompt">{text(prompt)}</span>'
        f'<span class="continuation">{text(continuation)}</span></pre></article>\n'
    )


def settings(label: str, pairs: Iterable[tuple[str, str]], *, folded: bool) -> str:
    """Names and values, under a label that opens and folds them."""
    body = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in pairs)
    return (
        f"<details{'' if folded else ' open'}><summary>{text(label)}</summary>"
        f'<table class="settings"><tbody>{body}</tbody></table></details>'
    )


def command(line: str) -> str:
    return f'<pre class="command"><code>{text(line)}</code></pre>'


def document(title: str, body: str, footer: str) -> str:
    """The whole page, with the style sheet inside."""
    style = resources.files("leadline.train").joinpath("page.css").read_text(encoding="utf8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
<footer>{text(footer)}</footer>
</body>
</html>
"""
