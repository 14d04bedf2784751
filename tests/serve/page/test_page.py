"""The page, as somebody uses it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx
import pytest
from playwright.sync_api import Error, Locator, Page, expect

from leadline.data.bundle import bundle
from leadline.model import accounting, v32
from leadline.model.transformer import Transformer
from leadline.serve.limits import Keys
from leadline.serve.service import Policy, Service
from leadline.serve.web import FILES
from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import THINK_END, Call, calls_block

if TYPE_CHECKING:
    from tests.serve.conftest import Running
    from tests.serve.page.conftest import Scripted, Serving, Stage, Visit

Opens = Callable[..., "AbstractContextManager[Stage]"]

WEATHER = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
HOLD = "(hold)"
ATTACKS = (
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg onload=window.pwned=1>",
    "[click](javascript:window.pwned=1)",
    "![x](https://example.org/spy.png)",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    '`"><b>bold</b>`',
    "</div></li></ol><style>body{display:none}</style>",
)


def role(page: Page, kind: Literal["button", "radio"], name: str) -> Locator:
    return page.get_by_role(kind, name=name, exact=True)


def stored(page: Page) -> Any:
    return json.loads(page.evaluate("localStorage.getItem('leadline.conversation')"))


# -- asking and answering ----------------------------------------------------------------------------------------------


def test_an_answer_streams_and_its_numbers_are_shown(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    engine.cached_tokens = 3
    turn = engine.say("Let me see.", THINK_END, "The **first** part,", HOLD, " the second part.")
    stage.ask("Why?")
    expect(page.locator(".text strong")).to_have_text("first")
    expect(page.locator(".text")).not_to_contain_text("second")
    expect(role(page, "button", "Stop")).to_be_visible()
    expect(page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    prompt_tokens = stage.engine.prompt_tokens()
    expect(page.locator("#m-context")).to_have_text(f"{prompt_tokens + turn.said} / 4,096")
    page.wait_for_timeout(100)  # no speed is told of less time
    turn.open.set()
    expect(page.locator(".text")).to_have_text("The first part, the second part.")
    expect(role(page, "button", "Send")).to_be_visible()
    expect(page.locator("#status")).to_have_text("The answer is complete")
    numbers = stored(page)["messages"][-1]["numbers"]
    assert (numbers["exact"], numbers["cached"], numbers["mode"]) == (True, 3, "high")
    assert numbers["tokens"] == len(turn.ids)
    assert numbers["context"] == numbers["prompt"] + numbers["tokens"]
    expect(page.locator("#m-context")).to_have_text(f"{numbers['context']} / 4,096")
    expect(page.locator("#m-speed")).to_have_text(re.compile(r"[\d.,]+ tok/s"))
    expect(page.locator("#m-first")).to_have_text(re.compile(r"[\d.]+ m?s"))
    expect(page.locator("#m-cached")).to_have_text(re.compile(r"[\d.]+%"))
    expect(page.locator("#m-cache")).to_have_text(re.compile(r"[\d.]+ \w?B, V3.2 [\d.]+ \wB"))
    assert stage.sent[0]["messages"] == [{"role": "user", "content": "Why?"}]
    assert stage.sent[0]["stream"] is True


def test_tokens_that_come_several_in_a_step_are_all_counted(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    engine.stride = 5
    turn = engine.say("Let me see.", THINK_END, "One, two, three.", HOLD, " And the rest." * 12)
    thinking = turn.ids.index(engine.think_end) + 1
    asked = time.monotonic()
    stage.ask("Why?")
    expect(page.locator(".text")).to_contain_text("three.")
    expect(page.locator("#m-context")).to_have_text(f"{engine.prompt_tokens() + turn.said} / 4,096")
    expect(page.locator(".thinking .facts")).to_contain_text(f"{thinking} tokens")
    page.wait_for_timeout(300)
    turn.open.set()
    expect(page.locator("#status")).to_have_text("The answer is complete")
    numbers = stored(page)["messages"][-1]["numbers"]
    assert (numbers["tokens"], numbers["thinkingTokens"]) == (len(turn.ids), thinking)
    assert numbers["speed"] * (time.monotonic() - asked) > len(turn.ids) / 2, "of tokens, and not of chunks"


def test_thinking_is_open_while_it_lasts_and_can_be_opened_again(stage: Stage) -> None:
    page = stage.page
    turn = stage.engine.say("First this,", HOLD, " then that.", THINK_END, "Done.")
    stage.ask("Why?")
    expect(page.locator(".thinking .title")).to_have_text("Thinking")
    expect(page.locator(".thought")).to_be_visible()
    turn.open.set()
    expect(page.locator(".thinking .title")).to_have_text("Thought")
    expect(page.locator(".thought")).to_be_hidden()
    expect(page.locator(".thinking .facts")).to_have_text(re.compile(r"\d+ tokens · [\d.]+ m?s"))
    page.locator(".thinking summary").click()
    expect(page.locator(".thought")).to_have_text("First this, then that.")


def test_stop_keeps_what_was_said_and_frees_the_engine(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    engine.say("", THINK_END, "one two three four", HOLD, " five six seven")
    stage.ask("Count.")
    expect(page.locator(".text")).to_have_text("one two three four")
    page.keyboard.press("Escape")
    expect(page.locator(".assistant .row .facts")).to_contain_text("stopped")
    expect(page.locator(".text")).to_have_text("one two three four")
    assert stored(page)["messages"][-1]["finish"] == "stopped"
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    deadline = time.monotonic() + 5
    while engine.num_open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.num_open == 0


def test_an_answer_stopped_before_it_began_can_be_asked_for_again(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    engine.say(HOLD, "never")
    engine.say("", THINK_END, "now")
    stage.ask("Well?")
    expect(page.locator(".thinking .title")).to_have_text("Reading")
    role(page, "button", "Stop").click()
    expect(page.locator(".message")).to_have_count(1)
    page.reload()
    role(page, "button", "Retry").click()
    expect(page.locator(".text")).to_have_text("now")
    assert stage.sent[0] == stage.sent[1]


def test_answer_again_asks_the_same_and_replaces(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    engine.say("", THINK_END, "heads")
    engine.say("", THINK_END, "tails")
    stage.ask("Toss a coin.")
    expect(page.locator(".text")).to_have_text("heads")
    role(page, "button", "Answer again").click()
    expect(page.locator(".text")).to_have_text("tails")
    expect(page.locator(".message")).to_have_count(2)
    assert stage.sent[0] == stage.sent[1]


def test_an_edited_question_takes_the_place_of_what_followed(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    for text in ("one", "two", "three"):
        engine.say("", THINK_END, text)
    for number, text in enumerate(("first", "second")):
        stage.ask(text)
        expect(stage.answer(number).locator(".text")).to_have_text(("one", "two")[number])
    page.locator(".user").first.hover()
    role(page, "button", "Edit the question").first.click()
    area = page.get_by_role("textbox", name="Edit the question")
    expect(area).to_be_focused()
    area.press("Escape")
    expect(page.locator(".user .bubble").first).to_have_text("first")
    role(page, "button", "Edit the question").first.click()
    area.fill("another")
    area.press("Enter")
    expect(page.locator(".text")).to_have_text(["three"])
    expect(page.locator(".bubble")).to_have_text(["another"])
    assert stage.sent[-1]["messages"] == [{"role": "user", "content": "another"}]


def test_what_was_thought_and_said_goes_back_with_the_next_question(stage: Stage) -> None:
    stage.engine.say("Hm.", THINK_END, "Yes.")
    stage.engine.say("", THINK_END, "No.")
    stage.ask("One?")
    expect(stage.answer().locator(".text")).to_have_text("Yes.")
    stage.ask("Two?")
    expect(stage.answer().locator(".text")).to_have_text("No.")
    assert stage.sent[1]["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
        {"role": "user", "content": "Two?"},
    ]


def test_mode_and_budget_and_settings_change_the_request(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    for _ in range(3):
        engine.say("ok")
    stage.choose("Non-think")
    expect(page.locator("#budget")).to_be_hidden()
    stage.ask("a")
    expect(stage.answer(0).locator(".text")).to_have_text("ok")
    stage.choose("Max")
    page.get_by_label("Thinking budget in tokens").fill("17")
    role(page, "button", "Settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Most tokens").fill("33")
    page.keyboard.press("Escape")
    stage.ask("b")
    expect(page.locator(".assistant .row .facts")).to_have_count(2)
    page.get_by_label("Thinking budget in tokens").fill("many")
    stage.ask("c")
    expect(page.get_by_role("alert")).to_contain_text("The thinking budget is no number (many)")
    assert stage.sent[0]["thinking"] == {"type": "disabled"}
    assert "reasoning_effort" not in stage.sent[0]
    assert stage.sent[1]["thinking"] == {"type": "enabled", "budget_tokens": 17}
    assert (stage.sent[1]["reasoning_effort"], stage.sent[1]["temperature"], stage.sent[1]["max_tokens"]) == (
        "max",
        0.25,
        33,
    )
    assert stage.sent[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len(stage.sent) == 2


# -- calls of tools ----------------------------------------------------------------------------------------------------


def test_a_call_is_shown_while_it_is_written_and_can_be_answered(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    call = calls_block([Call("get_weather", {"city": "Paris", "days": 3})])
    middle = next(place for place, piece in enumerate(call) if "days" in piece)
    turn = engine.say("", THINK_END, "I look.", *call[:middle], HOLD, *call[middle:])
    engine.say("", THINK_END, "It rains.")
    role(page, "button", "Settings").click()
    page.get_by_label("Tools").fill(json.dumps(WEATHER))
    role(page, "button", "Close settings").click()
    stage.ask("Umbrella?")
    expect(page.locator(".call .name")).to_have_text("get_weather")
    expect(page.locator(".call header .facts")).to_have_text("is being written")
    expect(page.locator(".call pre")).to_contain_text("city")
    turn.open.set()
    expect(page.locator(".call header .facts")).to_have_text("waits for its result")
    assert json.loads(page.locator(".call pre").inner_text()) == {"city": "Paris", "days": 3}
    role(page, "button", "Send result").click()  # without a result: nothing is sent, the box asks for one
    box = page.get_by_role("textbox", name="Result of get_weather")
    expect(box).to_be_focused()
    box.fill("4 mm")
    box.press("Control+Enter")
    expect(stage.answer().locator(".text")).to_have_text("It rains.")
    expect(page.locator(".result")).to_have_text("4 mm")
    assert stage.sent[0]["tools"] == WEATHER
    asked, called, result = stage.sent[1]["messages"]
    assert asked["content"] == "Umbrella?"
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris", "days": 3}
    assert result == {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "4 mm"}


def test_several_calls_are_answered_together_or_left_alone(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    page.locator("#open-settings").click()
    page.get_by_label("Tools").fill(json.dumps(WEATHER))
    page.keyboard.press("Escape")
    for _ in range(2):
        engine.say("", THINK_END, *calls_block([Call("get_weather", {"city": city}) for city in ("Rome", "Oslo")]))
    engine.say("", THINK_END, "Rome.")
    stage.ask("Where is it warmer?")
    boxes = page.get_by_role("textbox", name="Result of get_weather")
    expect(boxes).to_have_count(2)
    boxes.nth(0).fill("20")
    role(page, "button", "Send results").click()
    expect(boxes.nth(1)).to_be_focused()
    boxes.nth(1).fill("10")
    role(page, "button", "Send results").click()
    expect(stage.answer(1).locator(".call")).to_have_count(2)
    expect(page.locator(".result")).to_have_text(["20", "10"])
    assert [message.get("content") for message in stage.sent[1]["messages"][2:]] == ["20", "10"]
    expect(boxes).to_have_count(2)
    stage.ask("Just guess.")
    expect(stage.answer(2).locator(".text")).to_have_text("Rome.")
    expect(boxes).to_have_count(0)


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_an_answer_that_breaks_off_can_be_retried(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    turn = engine.say("", THINK_END, "half", HOLD, " of the answer", fails="out of memory")
    engine.say("", THINK_END, "all of the answer")
    stage.ask("Well?")
    expect(page.locator(".text")).to_contain_text("half")
    turn.open.set()
    expect(page.get_by_role("alert")).to_contain_text("Out of memory")
    expect(page.locator(".assistant .row .facts")).to_contain_text("incomplete")
    role(page, "button", "Retry").click()
    expect(page.locator(".text")).to_have_text("all of the answer")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_refusal_is_one_line_and_loses_nothing(stage: Stage) -> None:
    page = stage.page
    stage.ask("word " * 5000)
    expect(page.get_by_role("alert")).to_contain_text("tokens")
    expect(page.locator(".message")).to_have_count(1)
    assert "\n" not in page.locator("#trouble-text").inner_text()
    assert [complaint for complaint in stage.complaints if "400" not in complaint] == []
    stage.complaints.clear()
    role(page, "button", "Settings").click()
    page.get_by_label("Tools").fill("[{")
    page.keyboard.press("Escape")
    stage.ask("more")
    expect(page.get_by_role("alert")).to_contain_text("The tools are no JSON")


def test_a_server_with_keys_asks_for_one(
    visit: Visit, serving: Serving, scripted: Callable[[int], Scripted], tokenizer: Tokenizer
) -> None:
    key = "sk-" + "a" * 20
    engine = scripted(512)
    with (
        serving(Service(engine, tokenizer, Policy("guarded"), Keys([key]))) as running,
        visit(running.url, engine) as stage,
    ):
        page = stage.page
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("wrong-key-of-some-length")
        page.keyboard.press("Enter")
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("guarded")
        expect(page.get_by_role("alert")).to_be_hidden()
        engine.say("", THINK_END, "welcome")
        stage.ask("hello")
        expect(page.locator(".text")).to_have_text("welcome")
        assert key not in json.dumps(stored(page))
        assert [complaint for complaint in stage.complaints if "401" not in complaint] == []
        stage.complaints.clear()


# -- files -------------------------------------------------------------------------------------------------------------

FILES_OF_A_PROJECT = {
    "src/z.py": b"print(1)",
    "src.txt": b"",
    "a.md": b"```\ncode\n```\n",
    "B dir/\u00e9\u00a0\U0001f600.txt": b"one fault among some letters: " + b"\xff\n",
    "latin.txt": "\u00e9\u00e8\u00ea".encode("latin1"),
    "wide.txt": "\u00e9 and more".encode("utf-16"),
    "logo.png": b"\x89PNG\0",
    "pictures/big/a.png": b"\0",
    "pictures/b.png": b"\0",
    "mixed/c.png": b"\0",
    "mixed/d.txt": b"\xff\xff\xff",
    ".git/config": b"secret",
}


def test_a_folder_becomes_the_text_that_the_command_line_makes_of_it(
    stage: Stage, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    page = stage.page
    project = tmp_path / "project"
    for name, content in FILES_OF_A_PROJECT.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(content)
    packed = bundle([project]).text
    page.locator("#pick-folder").set_input_files(project)
    count = len(tokenizer.encode(packed))
    expect(page.locator("#files-summary")).to_have_text(f"11 files · {count:,} tokens")
    stage.engine.say("", THINK_END, "I see.")
    stage.ask("What is this?")
    expect(page.locator(".text")).to_have_text("I see.")
    assert stage.sent[0]["messages"][0] == {"role": "system", "content": packed}


def test_dropped_files_are_listed_and_removed(stage: Stage) -> None:
    page = stage.page
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            for (const [name, text] of [["b.txt", "bee"], ["a.txt", "ay"]]) transfer.items.add(new File([text], name));
            return transfer;
        }"""
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#dropzone")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#dropzone")).to_be_hidden()
    expect(page.locator("#files-summary")).to_contain_text("2 files ·")
    page.locator("#files summary").click()
    expect(page.locator("#files .path")).to_have_text(["a.txt", "b.txt"])
    role(page, "button", "Remove a.txt").click()
    expect(page.locator("#files-summary")).to_contain_text("1 file ·")
    page.reload()
    expect(page.locator("#files-summary")).to_contain_text("1 file ·")
    role(page, "button", "Remove all files").click()
    expect(page.locator("#files")).to_be_hidden()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_reload_keeps_the_conversation_also_in_the_middle_of_an_answer(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    engine.say("Hm.", THINK_END, "first answer")
    stage.ask("one")
    expect(page.locator(".text")).to_have_text("first answer")
    stage.choose("Max")
    engine.say("", THINK_END, "second", HOLD, " answer")
    stage.ask("two")
    expect(stage.answer(1).locator(".text")).to_have_text("second")
    page.reload()
    expect(page.locator(".bubble")).to_have_text(["one", "two"])
    expect(page.locator(".text").first).to_have_text("first answer")
    expect(stage.answer(1).locator(".text")).to_have_text("second")
    expect(stage.answer(1).locator(".row .facts")).to_contain_text("stopped")
    expect(role(page, "radio", "Max")).to_be_checked()
    role(page, "button", "New conversation").click()
    expect(page.locator("#welcome")).to_be_visible()
    role(page, "button", "Undo").click()
    expect(page.locator(".bubble")).to_have_text(["one", "two"])
    role(page, "button", "New conversation").click()
    page.reload()
    expect(page.locator(".message")).to_have_count(0)


def test_what_the_browser_has_no_room_for_is_said(stage: Stage) -> None:
    page = stage.page
    page.evaluate(
        """() => {
            let size = 2 ** 22, fill = "";
            for (; size >= 1024; size /= 2) {
                try { localStorage.setItem("fill", fill + "x".repeat(size)); fill += "x".repeat(size); } catch {}
            }
            localStorage.setItem("fill", fill.slice(4096));
        }"""
    )
    page.locator("#pick-files").set_input_files(
        {"name": "big.txt", "mimeType": "text/plain", "buffer": b"the quick brown fox " * 400}
    )
    expect(page.locator("#notice")).to_contain_text("The files are too large for the browser to keep")
    stage.engine.say("", THINK_END, "x " * 40)
    stage.ask("small")
    expect(page.locator(".assistant .row .facts")).to_be_visible()
    page.reload()
    expect(page.locator(".bubble")).to_have_text("small")
    expect(page.locator("#files")).to_be_hidden()


def test_a_conversation_is_downloaded_and_loaded_again(stage: Stage, tmp_path: Path) -> None:
    page = stage.page
    stage.engine.say("Hm.", THINK_END, "An answer.")
    stage.ask("A question")
    expect(page.locator(".text")).to_have_text("An answer.")
    with page.expect_download() as download:
        role(page, "button", "Download this conversation").click()
    assert re.fullmatch(r"leadline-[\d-]+\.json", download.value.suggested_filename)
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    role(page, "button", "New conversation").click()
    for number, wrong in enumerate(('{"kind": "other"}', "no JSON", '{"kind": "leadline-conversation", "version": 1}')):
        bad = tmp_path / f"bad{number}.json"
        bad.write_text(wrong)
        page.locator("#pick-conversation").set_input_files(bad)
        expect(page.locator("#notice")).to_contain_text(f"bad{number}.json was not loaded")
    page.locator("#pick-conversation").set_input_files(file)
    expect(page.locator(".bubble")).to_have_text("A question")
    expect(page.locator(".text")).to_have_text("An answer.")
    assert stored(page) == json.loads(file.read_text())


# -- hands, eyes and screens -------------------------------------------------------------------------------------------


def test_everything_works_without_a_mouse(stage: Stage) -> None:
    page, engine = stage.page, stage.engine
    question = page.get_by_role("textbox", name="Question")
    expect(question).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(question).not_to_be_focused()
    page.keyboard.press("/")
    expect(question).to_be_focused()
    page.keyboard.type("a/b")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    expect(question).to_have_value("a/b\nsecond line")
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(role(page, "radio", "High")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(role(page, "radio", "Non-think")).to_be_checked()
    page.keyboard.press("/")
    expect(question).to_be_focused()
    engine.say("```py\nx = 1\n```")
    page.keyboard.press("Enter")
    expect(page.locator(".text pre")).to_have_text("x = 1")
    assert stage.sent[0]["messages"][0]["content"] == "a/b\nsecond line"
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Answer again":
            break
    engine.say("once more")
    page.keyboard.press("Enter")
    expect(page.locator(".text")).to_have_text("once more")


def test_every_control_has_a_name(stage: Stage) -> None:
    stage.engine.say("Hm.", THINK_END, "`code`\n\n```\nblock\n```")
    stage.ask("q")
    expect(stage.page.locator(".text pre")).to_be_visible()
    nameless = stage.page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, meter, dialog")]
            .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length
                || node.getAttribute("aria-labelledby")))
            .map((node) => node.outerHTML)"""
    )
    assert nameless == []


def test_code_and_answers_are_copied(open_page: Opens) -> None:
    with open_page(permissions=["clipboard-read", "clipboard-write"]) as stage:
        page = stage.page
        stage.engine.say("", THINK_END, "Run **this**:\n\n```sh\nls -l\n```\n")
        stage.ask("q")
        role(page, "button", "Copy code").click()
        expect(page.locator(".copy[data-said]")).to_have_attribute("data-said", "Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "ls -l"
        role(page, "button", "Copy the answer").click()
        expect(page.locator(".assistant .row [data-said]")).to_have_attribute("data-said", "Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "Run **this**:\n\n```sh\nls -l\n```\n"


def test_colours_follow_the_system_until_they_are_chosen(open_page: Opens) -> None:
    def paper(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with open_page(color_scheme="dark") as stage:
        page = stage.page
        dark = paper(page)
        page.emulate_media(color_scheme="light")
        light = paper(page)
        assert dark != light
        page.locator("#theme").click()
        page.locator("#theme").click()
        assert paper(page) == dark
        page.reload()
        assert paper(page) == dark
        page.locator("#theme").click()
        assert paper(page) == light


def test_a_narrow_screen_shows_everything(open_page: Opens) -> None:
    with open_page(viewport={"width": 390, "height": 780}) as stage:
        page = stage.page
        stage.engine.say(
            "", THINK_END, "| a | b |\n|--|--|\n| " + "wide" * 60 + " | x |\n\n```\n" + "long " * 80 + "\n```"
        )
        stage.ask("word" * 100)
        expect(page.locator(".text pre")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate(
            "document.getElementById('scroller').scrollWidth <= document.getElementById('scroller').clientWidth"
        )
        for name in ("Send", "Add files", "Settings", "New conversation"):
            box = role(page, "button", name).bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
        expect(role(page, "radio", "Max")).to_be_in_viewport()


# -- safety ------------------------------------------------------------------------------------------------------------


def test_what_a_model_writes_stays_text(stage: Stage) -> None:
    page = stage.page
    everything = "\n\n".join(ATTACKS)
    call = calls_block([Call("get_weather", {"city": everything})])
    fenced = "".join(f"\n\n```{attack.split()[0].replace('`', '')}\n{attack}\n```" for attack in ATTACKS)
    stage.engine.say(everything, THINK_END, everything + fenced, *call)
    role(page, "button", "Settings").click()
    page.get_by_label("Tools").fill(json.dumps(WEATHER))
    page.keyboard.press("Escape")
    stage.ask(everything)
    expect(page.locator(".give textarea")).to_be_visible()
    assert page.evaluate("window.pwned") is None
    inside = "#messages :is(script, img, iframe, style, svg:not(.icon), b, [onerror], [onload], [href^=javascript])"
    expect(page.locator(inside)).to_have_count(0)
    assert page.locator(".bubble").text_content() == everything
    assert page.locator(".thought").text_content() == everything
    assert page.locator(".code code").all_text_contents() == list(ATTACKS)
    assert json.loads(page.locator(".call pre").inner_text()) == {"city": everything}
    expect(page.locator("#question")).to_be_visible()


def test_the_browser_itself_refuses_markup_and_foreign_things(stage: Stage) -> None:
    headers = httpx.get(stage.url).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    for text in ("document.body.innerHTML = '<b>x</b>'", "document.createElement('script').textContent = 'x'"):
        with pytest.raises(Error, match="Trusted"):
            stage.page.evaluate(text)
    assert stage.page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    assert len(stage.complaints) >= 2
    stage.complaints.clear()


def test_files_of_the_page_are_served_and_nothing_else(stage: Stage) -> None:
    for path in FILES:
        answer = httpx.get(stage.url + path)
        assert answer.status_code == 200
        assert "content-security-policy" in answer.headers
        assert not re.search(rb"https?://(?!www\.w3\.org)", answer.content), f"{path} names another server"
        assert not re.search(rb"innerHTML|insertAdjacentHTML|document\.write|\beval\b", answer.content)
    for path in ("/page/../web.py", "/page/%2e%2e/web.py", "/page/", "/page/web.py", "/index.html"):
        assert httpx.get(stage.url + path).status_code == 404


def test_the_meter_counts_as_the_plan_does(stage: Stage, model: Transformer) -> None:
    for tokens in (0, 1, 127, 128, 129, 1_000_000):
        found = httpx.get(f"{stage.url}/meter?tokens={tokens}").json()
        assert found["cache_bytes"] == accounting.kv_cache_bytes(model.config, tokens)
        assert found["v32_cache_bytes"] == v32.kv_cache_bytes(tokens)
    state = stage.engine.memory.state
    held = httpx.get(f"{stage.url}/meter?tokens=129").json()["held_bytes"]
    assert held == state.bytes_per_slot + 2 * state.bytes_per_page
    for wrong in ("-1", "x", "", "99999999999"):
        assert httpx.get(f"{stage.url}/meter?tokens={wrong}").status_code == 400


# -- a real model ------------------------------------------------------------------------------------------------------


def test_a_real_model_answers(visit: Visit, server: Running) -> None:
    with visit(server.url) as stage:
        page = stage.page
        role(page, "button", "Settings").click()
        page.get_by_label("Most tokens").fill("24")
        page.keyboard.press("Escape")
        stage.choose("Non-think")
        stage.ask("The quick brown fox")
        expect(page.locator(".assistant .row .facts")).to_contain_text("Non-think")
        numbers = stored(page)["messages"][-1]["numbers"]
        assert numbers["exact"]
        assert 1 <= numbers["tokens"] <= 24
        expect(page.locator("#m-cache")).to_contain_text("V3.2")
