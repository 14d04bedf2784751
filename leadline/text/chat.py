"""Chat: a conversation to the prompt that DeepSeek-V4 was trained on.

A prompt is one line of turns with nothing between them (line breaks here only for the eye):

    <｜begin▁of▁sentence｜>[effort][system text][tools][response format]
    <｜User｜>What is 2+2?<｜Assistant｜><think>Simple.</think>4.<｜end▁of▁sentence｜>
    <｜User｜>And 3+3?<｜Assistant｜><think>

- *Mode.* In a thinking mode the prompt ends with `<think>` and the model reasons first; in `non-think` it ends with
  `</think>`. How hard the model thinks is set by a few sentences at the very front, and by nothing else.
- *Dropped reasoning.* What was thought before the last user turn is left out, and those user turns end with `</think>`,
  as if the model had never reasoned: it is long, and the next question rarely needs it. With tools everything stays,
  because one task then spans many turns.
- *Tool results* are user turns: `<tool_result>...</tool_result>`, in the order of the calls that they answer, whatever
  order they arrived in. Neighbouring user and tool messages become one turn, joined by blank lines.
- *Tasks* are small questions about a conversation ("does this need a search?"), each a control token of its own that
  the model answers in a few tokens, without reasoning.

`render` reproduces the encoder published beside the weights (`encoding_dsv4.py`) byte for byte. Where that one fails an
assertion, crashes, or drops a task unseen, `render` raises ChatError.

A prompt is a list of pieces, because its text is not the whole truth: `<think>` typed by a user is seven characters and
not a control token. `Prompt.ids` keeps the two apart, which no tokenizer can do with the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from leadline.text.messages import (
    TASK_NAMES,
    Assistant,
    ChatError,
    Instructions,
    Part,
    Reminder,
    Turn,
    User,
    is_mapping,
    known,
    read_turns,
)
from leadline.text.tokenizer import BOS_TOKEN, EOS_TOKEN, Control, Tokenizer
from leadline.text.tools import THINK_END, THINK_START, calls_block, tools_block

BOS = Control(BOS_TOKEN)
EOS = Control(EOS_TOKEN)
USER = Control("<｜User｜>")
ASSISTANT = Control("<｜Assistant｜>")
LATEST_REMINDER = Control("<｜latest_reminder｜>")
EXTRACTED_URL = Control("<｜extracted_url｜>")
TASKS = {task: Control(f"<｜{task}｜>") for task in TASK_NAMES}

Mode = Literal["non-think", "low", "high", "max"]
Release = Literal["preview", "0731"]
Section = Literal["reasoning", "content"]

_THOROUGH = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_RELENTLESS = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""
# What stands at the very front of the prompt. In the refresh of 31 July 2026 the preview's max became high.
EFFORT: Mapping[Release, Mapping[Mode, str]] = {
    "preview": {"non-think": "", "high": "", "max": _THOROUGH},
    "0731": {"non-think": "", "low": "", "high": _THOROUGH, "max": _RELENTLESS},
}

_SCHEMA_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
# In the words of DeepSeek's later encoder; the published one knows schemas only, and would take this for one.
_ANY_JSON = '{"type": "json_object"}'
_ANY_JSON_FORMAT = (
    "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation."""

    pieces: Sequence[str]
    """`Control` for control tokens, plain `str` for text."""
    opens: Section | None
    """What the model writes next, where a parser of its reply starts. None if the prompt asks for no reply."""

    @property
    def text(self) -> str:
        """The prompt as one string. For the eye and for tests: control tokens and text look alike in it."""
        return "".join(self.pieces)

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt as token ids; text never becomes a control token."""
        return tokenizer.encode_pieces(self.pieces)


def render(
    messages: Sequence[Mapping[str, object]],
    mode: Mode = "high",
    release: Release = "preview",
    drop_thinking: bool = True,
) -> Prompt:
    """The prompt of a conversation; see `Message` for what a message holds.

    mode: `non-think`, or how hard the model thinks; which modes exist depends on the release, see `EFFORT`.
    drop_thinking: leave out the reasoning before the last user turn; messages with tools switch that off.

    A prompt that asks for a reply ends with a user or tool message, or with an assistant message that has `prefix`. A
    conversation that ends with a complete assistant message is rendered as well, for training. Time and memory are
    linear in the conversation. Raises ChatError.
    """
    effort = EFFORT[known(release, EFFORT, "release")]
    prefix = effort[known(mode, effort, f"release {release!r}: mode")]
    turns = read_turns(messages)
    thinking = mode != "non-think"
    if thinking and drop_thinking and not _have_tools(turns):
        turns = _without_past_developers(turns)
        layout = _Layout(turns, thinking, thinks_from=_last_user(turns))
    else:
        layout = _Layout(turns, thinking, thinks_from=0)
    pieces: list[str] = [BOS, prefix]
    for n in range(len(turns)):
        pieces += layout.turn(n)
        pieces += layout.transition(n)
    return Prompt(pieces, layout.opens(pieces[-1]))


def with_tools(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
) -> list[Mapping[str, object]]:
    """The conversation with tools declared on its system message; one is added in front if there is none."""
    return _with_system(messages, "tools", tools) if tools else list(messages)


def with_response_format(
    messages: Sequence[Mapping[str, object]], response_format: Mapping[str, object]
) -> list[Mapping[str, object]]:
    """The conversation with a response format on its system message.

    response_format: in OpenAI's shape: of type text, json_object or json_schema. Raises ChatError for any other.
    """
    kind = known(response_format.get("type"), ("text", "json_object", "json_schema"), "response_format: type")
    if kind == "text":
        return list(messages)
    if kind == "json_object":
        return _with_system(messages, "response_format", {"type": kind})
    schema = response_format.get("json_schema")
    if not is_mapping(schema) or not schema.get("schema"):
        raise ChatError('response_format has no schema; use {"type": "json_schema", "json_schema": {"schema": ...}}')
    return _with_system(messages, "response_format", schema["schema"])


def _with_system(messages: Sequence[Mapping[str, object]], key: str, value: object) -> list[Mapping[str, object]]:
    if not messages or messages[0].get("role") != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    if messages[0].get(key):
        raise ChatError(f"message 0 has {key} of its own; give them in one place")
    return [{**messages[0], key: value}, *messages[1:]]


# -- the layout of turns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Writes turns. thinks_from: the first turn at which the model thinks, if it thinks at all."""

    turns: Sequence[Turn]
    thinking: bool
    thinks_from: int

    def turn(self, n: int) -> list[str]:
        """Pieces of a turn, without what leads over to the next."""
        turn = self.turns[n]
        if isinstance(turn, Reminder):
            return [LATEST_REMINDER, turn.content]
        if isinstance(turn, Instructions):
            return _instructions(turn)
        if isinstance(turn, User):
            return [
                USER,
                "\n\n".join(_in_call_order(turn.parts)),
                *([] if turn.url is None else [EXTRACTED_URL, turn.url]),
            ]
        return self._assistant(turn, reasons=self._reasons(n, turn))

    def transition(self, n: int) -> list[str]:
        """Pieces that ask for a reply or for the answer to a task, if one follows."""
        turn = self.turns[n]
        following = self.turns[n + 1] if n + 1 < len(self.turns) else None
        if following is not None and not isinstance(following, Assistant | Reminder):
            if turn.task is not None:
                raise ChatError(
                    f"message {turn.index}: its task {turn.task!r} would be lost, because no answer follows; "
                    f"put an assistant message after it, or nothing"
                )
            return []
        if turn.task == "action":
            return [ASSISTANT, THINK_START if self.thinking else THINK_END, TASKS["action"]]
        if turn.task is not None:
            return [TASKS[turn.task]]
        if not _is_user(turn):
            return []
        thinks = self._thinks(n) and not _never_reasoned(following)
        return [ASSISTANT, THINK_START if thinks else THINK_END]

    def opens(self, last_piece: str) -> Section | None:
        """What the model writes after the last turn."""
        n = len(self.turns) - 1
        turn = self.turns[n]
        if isinstance(turn, Assistant) and not turn.has_eos:
            return "reasoning" if self._reasons(n, turn) and _continues_reasoning(turn) else "content"
        if last_piece == THINK_START:
            return "reasoning"
        return "content" if last_piece in (THINK_END, *TASKS.values()) else None

    def _thinks(self, n: int) -> bool:
        return self.thinking and n >= self.thinks_from

    def _reasons(self, n: int, turn: Assistant) -> bool:
        answers_task = n > 0 and self.turns[n - 1].task is not None
        return self._thinks(n) and not answers_task and not _never_reasoned(turn)

    def _assistant(self, turn: Assistant, reasons: bool) -> list[str]:
        pieces: list[str] = []
        if reasons:
            pieces += [turn.reasoning or ""] if _continues_reasoning(turn) else [turn.reasoning or "", THINK_END]
        pieces.append(turn.content)
        if turn.calls:
            pieces += calls_block(turn.calls)
        return [*pieces, EOS] if turn.has_eos else pieces


def _instructions(turn: Instructions) -> list[str]:
    pieces = [USER, turn.content] if turn.is_developer else [turn.content]
    if turn.functions:
        pieces += ["\n\n", *tools_block(turn.functions)]
    if turn.response_format:
        any_json = turn.response_format == _ANY_JSON
        pieces += ["\n\n", _ANY_JSON_FORMAT if any_json else _SCHEMA_FORMAT + turn.response_format]
    return pieces


def _in_call_order(parts: Sequence[Part]) -> Iterator[str]:
    """Texts with the tool results in the order of their calls, at the places where tool results stand."""
    results = iter(sorted((part for part in parts if part.order is not None), key=lambda part: part.order or 0))
    return ((part if part.order is None else next(results)).text for part in parts)


def _continues_reasoning(turn: Assistant) -> bool:
    return turn.is_prefix and not turn.content


def _never_reasoned(turn: Turn | None) -> bool:
    """Whether a reply to go on with came without reasoning, although the mode may ask for some."""
    return isinstance(turn, Assistant) and turn.is_prefix and turn.reasoning is None


def _is_user(turn: Turn) -> bool:
    return isinstance(turn, User) or (isinstance(turn, Instructions) and turn.is_developer)


def _last_user(turns: Sequence[Turn]) -> int:
    """Position of the last user turn, or 0."""
    return max((n for n, turn in enumerate(turns) if _is_user(turn)), default=0)


def _have_tools(turns: Sequence[Turn]) -> bool:
    return any(isinstance(turn, Instructions) and turn.functions for turn in turns)


def _without_past_developers(turns: Sequence[Turn]) -> list[Turn]:
    last = _last_user(turns)
    return [
        turn for n, turn in enumerate(turns) if n >= last or not (isinstance(turn, Instructions) and turn.is_developer)
    ]
