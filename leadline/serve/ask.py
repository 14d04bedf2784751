"""Ask: what any of the protocols boils down to, and how it becomes requests to the engine.

Four protocols ask for the same few things in different words. Each is translated to an `Ask`, and from there on there
is one path: the conversation is rendered, forms are compiled, limits are checked, and each wanted answer becomes one
request to the engine and a `Reply` that reads it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from leadline.engine.request import LIKE_THE_MODEL, RequestError, Sampling
from leadline.serve.fields import Sampled
from leadline.serve.grammar import Format, GrammarError, any_object_form, either, json_form
from leadline.serve.limits import Refused
from leadline.serve.reply import NO_FRAME, Reply
from leadline.serve.service import MAX_NEEDS_TOKENS, Service
from leadline.serve.wanted import Wanted
from leadline.text.chat import EFFORT, Mode, Prompt, render, with_response_format, with_tools
from leadline.text.messages import ChatError
from leadline.text.tokenizer import TokenizerError

_Value = TypeVar("_Value")

_LOG = logging.getLogger("leadline.serve")

_TOOL_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)
_MOST_STOPS, _LONGEST_STOP = 16, 512

# Names of effort that other vendors' clients send.
_EFFORTS: Mapping[str, Mode] = {
    "none": "non-think",
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model may or must call tools. names: only these may be called; None: any."""

    kind: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None


AUTO = ToolChoice()


@dataclass(frozen=True)
class Ask:
    """A conversation that wants an answer, or `choices` of them.

    tools: in OpenAI's form. parallel: whether one answer may hold several calls. response_format: in OpenAI's form.
    budget: most tokens of thinking. stop: texts that end the answer. max_tokens: thinking included.
    """

    messages: Sequence[Mapping[str, Any]]
    mode: Mode
    sampling: Sampling = LIKE_THE_MODEL
    max_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = AUTO
    parallel: bool = True
    response_format: Mapping[str, Any] | None = None
    budget: int | None = None
    stop: tuple[str, ...] = ()
    choices: int = 1


# -- what clients say, in our words -------------------------------------------------------------------------------


def mode_of(service: Service, effort: str | None, enabled: bool | None) -> Mode:
    """The mode of a request. effort: as a client calls it; enabled: whether it asks for thinking. Raises Refused."""
    policy = service.policy
    if enabled is False:
        return "non-think"
    mode = policy.mode
    if effort is not None:
        if effort not in _EFFORTS:
            raise Refused(
                400,
                f"reasoning_effort {effort!r} is unknown; use one of {', '.join(_EFFORTS)}",
                param="reasoning_effort",
            )
        mode = _EFFORTS[effort]
    elif enabled and mode == "non-think":
        mode = "high"
    if mode not in EFFORT[policy.release]:
        mode = "high"  # the preview has no low
    if mode == "max" and service.context_tokens < MAX_NEEDS_TOKENS and not policy.allow_short_max:
        raise Refused(
            400,
            f"thinking with effort max needs a context of {MAX_NEEDS_TOKENS:,} tokens, this server has "
            f"{service.context_tokens:,}; ask for high, or start the server with allow_short_max=yes",
            code="context_too_short",
            param="reasoning_effort",
        )
    return mode


def sampling_of(service: Service, body: Sampled, logprobs: int | None) -> Sampling:
    """How the tokens of an answer are drawn; without a seed, by one that nobody can guess. Raises Refused."""
    wrong = next((token for token in body.logit_bias or () if not 0 <= token < service.vocab_size), None)
    if wrong is not None:
        raise Refused(
            400, f"logit_bias: {wrong} is no token; ids go from 0 to {service.vocab_size - 1}", param="logit_bias"
        )
    try:
        return Sampling(
            _given(body.temperature, 1.0),
            _given(body.top_p, 1.0),
            max(_given(body.top_k, 0), 0),  # for vLLM, -1 is all
            _given(body.min_p, 0.0),
            _given(body.repetition_penalty, 1.0),
            _given(body.presence_penalty, 0.0),
            _given(body.frequency_penalty, 0.0),
            body.logit_bias or {},
            secrets.randbits(62) if body.seed is None else body.seed,
            logprobs,
        )
    except RequestError as error:
        raise Refused(400, str(error), param=str(error).split(" ", 1)[0]) from None


def _given(value: _Value | None, default: _Value) -> _Value:
    return default if value is None else value


def tool_choice_of(given: Any) -> tuple[ToolChoice, bool]:
    """OpenAI's tool_choice, and whether it names a single tool. Raises Refused."""
    if given is None or isinstance(given, str):
        return ToolChoice(given or "auto"), False  # pyright: ignore[reportArgumentType]  # pydantic has checked it
    function = given.get("function", given)  # the newer protocol has the name beside the type
    name = function.get("name") if isinstance(function, dict) else None
    if given.get("type") == "function" and isinstance(name, str):
        return ToolChoice("required", (name,)), True
    allowed = given.get("allowed_tools", given)
    if given.get("type") == "allowed_tools" and isinstance(allowed, dict) and isinstance(allowed.get("tools"), list):
        names = [tool.get("function", tool).get("name") for tool in allowed["tools"] if isinstance(tool, dict)]
        mode = allowed.get("mode", "auto")
        if mode in ("auto", "required") and names and all(isinstance(name, str) for name in names):
            return ToolChoice(mode, tuple(names)), False
    raise Refused(
        400,
        'tool_choice is not understood; use "auto", "none", "required" or '
        '{"type": "function", "function": {"name": ...}}',
        param="tool_choice",
    )


def stops_of(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop texts. Raises Refused."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MOST_STOPS or any(not 0 < len(each) <= _LONGEST_STOP for each in stops):
        raise Refused(400, f"stop: give at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters", param="stop")
    return stops


# -- from the ask to the engine -------------------------------------------------------------------------------------


async def open_replies(service: Service, ask: Ask, namespace: str, frame: Mapping[str, Any] = NO_FRAME) -> list[Reply]:
    """Submit an ask; one reply for each choice, of which the caller reads or closes all. frame: see `Reply`. Raises
    Refused."""
    _require_choices(service, ask.choices)
    service.require_room(ask.choices)
    prompt, ids = await asyncio.to_thread(encoded, service, ask)
    opens = prompt.opens
    if opens is None:
        raise Refused(400, "the conversation asks for no answer; end it with a user or tool message", param="messages")
    form = _form(service, ask)
    try:
        grammar = None if form is None else await asyncio.to_thread(service.grammars.compile, form)
    except GrammarError as error:
        raise Refused(400, str(error), param="response_format" if ask.response_format else "tools") from None
    require_room_for_prompt(service, len(ids))
    service.require_room(ask.choices)  # others may have come while this was being prepared
    wanted = Wanted(
        tuple(ids),
        ask.max_tokens or _default_max_tokens(service, len(ids)),
        ask.sampling,
        ask.mode,
        opens,
        ask.budget,
        form,
        may_call=bool(ask.tools) and ask.tool_choice.kind != "none",  # no markup of calls where nobody expects a call
        one_call=not ask.parallel,
        stop=ask.stop,
        namespace=namespace,
    )
    seeds = [ask.sampling.seed + choice for choice in range(ask.choices)]
    each = [replace(wanted, sampling=replace(ask.sampling, seed=seed)) for seed in seeds]
    if service.policy.log_prompts:
        _LOG.info("prompt: %s", json.dumps(prompt.text, ensure_ascii=False))
    return [Reply(service, one, grammar, frame=frame) for one in each]


def encoded(service: Service, ask: Ask) -> tuple[Prompt, list[int]]:
    """The prompt of an ask, and its ids. Takes long for a long one: not for the event loop. Raises Refused."""
    try:
        messages = with_tools([_public(message) for message in ask.messages], _checked_tools(ask))
        if ask.response_format is not None:
            messages = with_response_format(messages, ask.response_format)
        prompt = render(messages, ask.mode, service.policy.release)
        return prompt, prompt.ids(service.tokenizer)
    except (ChatError, TokenizerError) as error:
        raise Refused(400, str(error), param="messages") from None


def _public(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message of the public protocols, where the developer writes what used to be the system's text. The format's own
    developer turn belongs to DeepSeek's search agents."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def open_completion(
    service: Service,
    ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int | None,
    stop: tuple[str, ...],
    namespace: str,
) -> Reply:
    """Submit a prompt without a conversation; its reply is plain text. The caller has checked the ids and
    made sure of room."""
    most = max_tokens or _default_max_tokens(service, len(ids))
    return Reply(service, Wanted(tuple(ids), most, sampling, stop=stop, namespace=namespace))


def require_ids(service: Service, ids: Sequence[int]) -> None:
    """Raises Refused for ids that the model does not know, and for a prompt without any."""
    if not ids:
        raise Refused(400, "the prompt is empty; give at least one token", param="prompt")
    wrong = next((id for id in ids if not 0 <= id < service.vocab_size), None)
    if wrong is not None:
        raise Refused(400, f"{wrong} is no token; ids go from 0 to {service.vocab_size - 1}", param="prompt")
    require_room_for_prompt(service, len(ids))


def _require_choices(service: Service, choices: int) -> None:
    if not 1 <= choices <= service.limits.choices:
        raise Refused(400, f"n is {choices}: expected 1 to {service.limits.choices}", param="n")


def require_room_for_prompt(service: Service, tokens: int) -> None:
    if tokens >= service.context_tokens:
        raise Refused(
            400,
            f"the prompt has {tokens:,} tokens, this server's context is {service.context_tokens:,}, answer included",
            code="context_length_exceeded",
            param="messages",
        )


def _default_max_tokens(service: Service, prompt_tokens: int) -> int:
    rest = service.context_tokens - prompt_tokens
    return min(rest, service.limits.output_tokens or rest)


def _checked_tools(ask: Ask) -> Sequence[Mapping[str, Any]]:
    names = [str(tool["function"].get("name", "")) for tool in ask.tools]
    bad = next((name for name in names if not _TOOL_NAME.fullmatch(name)), None)
    if bad is not None:
        raise Refused(400, f"a tool is named {bad!r}; use 1 to 128 letters, digits, _, - and .", param="tools")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(400, f"two tools are named {twice!r}; give each a name of its own", param="tools")
    unknown = next((name for name in ask.tool_choice.names or () if name not in names), None)
    if unknown is not None:
        raise Refused(400, f"tool_choice names {unknown!r}, which is none of the tools", param="tool_choice")
    if ask.tool_choice.kind == "required" and not names:
        raise Refused(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    return ask.tools


def _form(service: Service, ask: Ask) -> Format | None:
    """The form of the answer, if it has to have one: calls, a JSON value, either, or any text with strict calls."""
    schemas = [tool["function"].get("parameters") for tool in ask.tools] + [ask.response_format]
    if len(json.dumps(schemas, default=str)) > service.limits.grammar_bytes and _needs_form(ask):
        raise Refused(400, f"the schemas are longer than {service.limits.grammar_bytes:,} characters", param="tools")
    value = _json_form(ask.response_format)
    names, kind = ask.tool_choice.names, ask.tool_choice.kind
    tools = [tool for tool in ask.tools if names is None or tool["function"]["name"] in names]
    try:
        if kind == "required":
            return service.grammars.calls(tools, ask.parallel)
        if kind == "none" or not tools:
            return value
        if value is not None:
            return either(value, service.grammars.calls(tools, ask.parallel))
        return service.grammars.text_or_calls(tools, ask.parallel) if _is_strict(ask) else None
    except GrammarError as error:
        raise Refused(400, str(error), param="tools") from None
    except RecursionError:
        raise Refused(400, "the schema cannot be enforced: it refers to itself without end", param="tools") from None


def _needs_form(ask: Ask) -> bool:
    return ask.tool_choice.kind == "required" or _is_strict(ask) or _json_form(ask.response_format) is not None


def _is_strict(ask: Ask) -> bool:
    """Whether calls are to fit their schemas also where the model is free to call nothing."""
    return any(tool["function"].get("strict") is True for tool in ask.tools)


def _json_form(response_format: Mapping[str, Any] | None) -> Format | None:
    kind = (response_format or {}).get("type")
    if response_format is None or kind in (None, "text"):
        return None
    return any_object_form() if kind == "json_object" else json_form(response_format["json_schema"]["schema"])
