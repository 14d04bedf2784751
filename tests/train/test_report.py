"""The report page: every section, true numbers, escaped text, nothing loaded from elsewhere, runs of any length."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leadline.model import accounting
from leadline.model.config import TINY
from leadline.train.gain import Curve, ResidualGain
from leadline.train.report import ReportError, Sample, block_labels, uncompressed_cache_bytes, write_report

VOID_TAGS = {"meta", "br", "hr", "img", "input", "link"}
SECTIONS = (
    "learning", "sparse-attention", "experts", "optimisation-and-speed", "kv-cache", "residual-mixing", "samples",
    "settings", "run-it-again",
)  # fmt: skip
GAIN = ResidualGain(
    constrained=Curve((1.0, 1.0), (1.001, 1.0025)),
    unconstrained=Curve((1.5, 12.25), (1.25, 2345.5)),
)
SAMPLE = Sample("def f(x):\n", "    return x\n", "somewhere.py")


@dataclass(frozen=True)
class Inner:
    mtp: float = 0.3


@dataclass(frozen=True)
class Settings:
    out: Path = Path("runs/<b>")
    steps: int = 12
    weights: Inner = field(default_factory=Inner)


class Page(HTMLParser):
    """What a browser would find: tags in balance, identifiers, links, numbers, text by section."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes.get("id") or ""
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def numbers(self) -> set[float]:
        return {float(attributes["value"] or "nan") for attributes in self.all("data")}


def rows_of(num_steps: int, *, layers: int = 5, **changes: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(num_steps)
    rows = []
    for step in range(1, num_steps + 1):
        row = {
            "step": step,
            "tokens": 128 * step,
            "seconds": 0.5 * step,
            "loss": 5.5 / step**0.3,
            "mtp_loss": 5.6 / step**0.2,
            "index_kl": 0.4 / step,
            "balance_loss": 1.0,
            "recall": 1 - 0.5 / step,
            "grad_norm": float(rng.lognormal()),
            "lr": 1e-2,
            "dense": step <= num_steps // 3,
            "tokens_per_second": 1000.0 + step,
            "expert_load": rng.dirichlet(np.full(8, 20.0), layers).round(4).__mul__(8).tolist(),
        }
        if step % 5 == 0:
            row["heldout_bpb"] = 4.0 / step**0.2
        rows.append(row | changes)
    return rows


def summary_of(num_steps: int) -> dict[str, Any]:
    return {
        "steps": num_steps,
        "tokens": 128 * num_steps,
        "seconds": 0.5 * num_steps,
        "heldout_bpb": 2.7182818,
        "parameters": 1234567,
        "heldout_tokens": 4321,
        "threads": 2,
    }


def write(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    arguments = {
        "title": "a run",
        "command": "leadline demo steps=12",
        "settings": Settings(),
        "config": TINY,
        "summary": summary_of(max(len(rows), 1)),
        "samples": [SAMPLE],
        "gain": GAIN,
    }
    return write_report(folder, **arguments | changes).read_text(encoding="utf8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("run"), rows_of(60))


def test_every_section_is_there_and_linked(html):
    page = Page(html)
    sections = tuple(attributes["id"] for attributes in page.all("section") if "id" in attributes)
    assert sections == SECTIONS
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in SECTIONS]


def test_names_are_unique_and_what_they_are_used_for_exists(html):
    names = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(set(names)) == len(names)
    used = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert used
    assert set(used) <= set(names)


def test_nothing_is_loaded(html):
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "img", "image"}
    assert not [
        name for _, attributes in page.tags for name in attributes if name in ("src", "srcset", "data", "xmlns")
    ]
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert all((attributes["href"] or "").startswith("#") for _, attributes in page.tags if "href" in attributes)


def test_numbers_are_those_of_the_run(html):
    rows, numbers, text = rows_of(60), Page(html).numbers, Page(html).text
    assert {2.7182818, 128.0 * 60, 0.5 * 60, 1234567.0} <= numbers
    assert np.mean([row["loss"] for row in rows[-6:]]) in numbers
    assert np.mean([row["recall"] for row in rows[-6:]]) in numbers
    assert {1.0025, 12.25, 2345.5} <= numbers
    assert float(accounting.kv_cache_bytes(TINY, 4096)) in numbers
    assert float(uncompressed_cache_bytes(TINY, 4096)) in numbers
    for shown in ("2.718", "1.23M", "7,680", "30.0 s", "CPU threads: 2", "60 steps"):
        assert shown in text[""]
    assert "50.4 GB" in text["kv-cache"]
    assert "10.5%" in text["kv-cache"]
    assert "steps=60" in text["run-it-again"]
    assert "leadline demo steps=12" in text["run-it-again"]
    assert "weights.mtp" in text["settings"]
    assert "runs/<b>" in text["settings"]


def test_every_picture_has_words_and_how_to_read_it(html):
    page = Page(html)
    words = [attributes["aria-label"] or "" for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(words) == len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("svg")) == 12
    assert len(set(words)) == 12
    assert all(re.search(r"\d", each) and each.endswith(".") for each in words)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert all(caption.endswith(".") and ". " not in caption for caption in captions)


def test_border_between_dense_and_sparse_is_marked(html, tmp_path):
    assert html.count("sparse from step 21") == 3 + 2  # in three charts, and in the words of two
    for dense, words in ((True, "dense to the end"), (False, "sparse from step 1")):
        page = write(tmp_path, rows_of(9, dense=dense))
        assert words in page
        assert ("dense warm-up</text>" in page) is dense


def test_hostile_text_stays_text(tmp_path):
    hostile = "</pre></section><script>alert('&amp;')</script>\x00\x1b[31m\x7f\r\ud800 \U0001f9ed"
    html = write(tmp_path, rows_of(3), title=hostile, command=hostile, samples=[Sample(hostile, hostile, hostile)])
    page = Page(html)
    assert not page.all("script")
    assert page.text["samples"].count("</pre></section><script>alert('&amp;')</script>") == 3
    assert "\U0001f9ed" in page.text["samples"]
    assert not [character for character in html if ord(character) < 32 and character not in "\n\t"]
    assert "\u2400\u241b[31m\u2421\u240d?" in page.text["samples"]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_short_run_without_measurements(tmp_path, num_steps):
    rows = rows_of(num_steps, recall=None)
    assert not any("heldout_bpb" in row for row in rows)
    summary = summary_of(num_steps)
    del summary["heldout_bpb"]
    html = write(tmp_path, rows, summary=summary, samples=[])
    assert Page(html).text[""].count("not measured") == 2
    assert html.count(">not measured in this run</text>") == 2
    assert "This run continued no texts." in html


def test_recall_that_starts_late_and_held_out_text_only_at_the_end(tmp_path):
    rows = rows_of(4)
    rows[0]["recall"] = rows[1]["recall"] = None
    html = write(tmp_path, rows)
    assert "from 0.833 to 0.875" in html
    assert "0 evaluations of held-out text during the run; 2.718 over all of it at the end." in html


def test_more_blocks_than_colours_and_a_constant_gradient(tmp_path):
    config = TINY.replace(num_hidden_layers=9, compress_ratios=(0, *(4, 128) * 4, 0))
    html = write(tmp_path, rows_of(30, layers=10, grad_norm=0.0), config=config)
    assert "median block" in html
    assert "layer 8" in html


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_run_without_steps_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf8")
    arguments = {"settings": Settings(), "config": TINY, "summary": summary_of(1), "samples": [], "gain": GAIN}
    with pytest.raises(ReportError, match=r"metrics\.jsonl: holds no steps; a report needs"):
        write_report(tmp_path, title="none", command="", **arguments)
    assert not (tmp_path / "report.html").exists()


def test_old_page_stays_when_the_new_one_cannot_be_made(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("the old page", encoding="utf8")
    with pytest.raises(KeyError):
        write(tmp_path, rows_of(3), summary={})
    assert page.read_text(encoding="utf8") == "the old page"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html"}


def test_same_run_makes_the_same_page(tmp_path, html):
    assert write(tmp_path, rows_of(60)) == html


def test_labels_of_blocks():
    assert block_labels(TINY, 5) == ["layer 0 (hash)", "layer 1", "layer 2", "layer 3", "MTP"]
    assert block_labels(TINY, 4)[-1] == "layer 3"
    assert block_labels(TINY, 6)[-2:] == ["MTP 0", "MTP 1"]


# -- colours -----------------------------------------------------------------------------------------------------


def palettes(html: str) -> list[dict[str, str]]:
    """The colours of light mode, and of dark mode."""
    blocks = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of the Web Content Accessibility Guidelines, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_defined_and_readable_in_light_and_dark(html):
    light, dark = palettes(html)
    assert light.keys() == dark.keys()
    assert set(re.findall(r"var\(--(\w+)\)", html)) <= light.keys() | {"sans", "mono"}
    assert not re.search(r"#0(\d)0f0\1", html)  # placeholders of the charts
    for palette in (light, dark):
        for role in ("ink", "muted", "blue", "orange", "green", "purple", "red"):
            assert contrast(palette[role], palette["card"]) >= 4.5, role
            assert contrast(palette[role], palette["page"]) >= 4.2, role
        assert contrast(palette["blue"], palette["wash"]) >= 4.5
