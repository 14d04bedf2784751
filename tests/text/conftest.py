"""Random conversations that the tests of this layer share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

# Texts that look like markup, that JSON escapes, that Unicode makes long, and that end where markup begins.
_WORDS = (
    *("hello", "2 + 2 = 4", "é", "深度求索", "🌊", "ﬀ", "\u2028", "\x7f", "\x00", "\t", " ", "\n", "\n\n", "\r\n", ""),
    *("{}", '"', "\\", "<", "</", "<｜", "｜DSML｜", "/｜DSML｜", "<｜DSML｜tool_calls>", "</｜DSML｜parameter>"),
    *("<think>", "</think>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<tool_result>", "</tool_result>", "## Tools"),
    *("true", "null", '" string="true">', "{{ x }}", "%"),
)
_KEYS = ("city", "n", "shipping address", "", "string=", "日本", "<｜DSML｜", "a'b", "\n")
_TASKS = ("action", "query", "authority", "domain", "read_url")

Message = dict[str, Any]


class Conversations:
    """Draws conversations that `render` accepts.

    everywhere: only what the package `deepseek-recipe`, DeepSeek's own later encoder, lays out in the same way: no
    tasks, no developer, no empty user text, calls with at least one parameter, plain numbers.
    objects: arguments of calls as objects instead of JSON text.
    """

    def __init__(self, seed: int, everywhere: bool = False, objects: bool = False) -> None:
        self.random = random.Random(seed)
        self.everywhere = everywhere
        self.objects = objects
        self._calls = 0

    def conversation(self) -> list[Message]:
        messages: list[Message] = []
        if self._chance(0.7):
            messages.append({"role": "system", "content": self.text(), **self._declarations()})
        for _ in range(self.random.randint(0, 3)):
            messages += [*self._user_turn(), *self._assistant_turns()]
        messages += self._user_turn() if self._chance(0.6) or not messages else self._assistant_end()
        if messages[-1]["role"] not in ("user", "tool", "developer", "assistant"):
            messages.append({"role": "user", "content": self._user_text()})
        if self.everywhere and messages[-1]["role"] == "assistant" and not messages[-1].get("prefix"):
            messages.append({"role": "user", "content": self._user_text()})
        return messages

    def text(self) -> str:
        return "".join(self.random.choices(_WORDS, k=self.random.randint(0, 5)))

    def value(self, depth: int = 2) -> Any:
        """Any JSON value."""
        kind = self.random.randrange(8 if depth else 6)
        if kind < 2:
            return self.text()
        if kind == 2:
            return self.random.choice((0, -1, 7, 2**53))
        if kind == 3:
            return self.random.choice((0.5, -0.0, 1e22, 1.0) if self.everywhere else (0.5, 1e-7, 1e22, 2**70, 1e400))
        if kind < 6:
            return self.random.choice((True, False, None))
        items = range(self.random.randint(0, 3))
        if kind == 6:
            return [self.value(depth - 1) for _ in items]
        return {self.random.choice(_KEYS): self.value(depth - 1) for _ in items}

    def call(self) -> Message:
        self._calls += 1
        names = self.random.sample(_KEYS, self.random.randint(1 if self.everywhere else 0, 3))
        arguments = {name: self.value() for name in names}
        broken = not self.objects and self._chance(0.05)
        as_text = json.dumps(arguments, ensure_ascii=self._chance(0.5), indent=self.random.choice((None, 1)))
        text = as_text[: len(as_text) // 2] if broken and not self.everywhere else as_text
        function = {"name": f"f_{self._calls}", "arguments": arguments if self.objects else text}
        return {"id": f"call_{self._calls:03}", "type": "function", "function": function}

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _declarations(self) -> Message:
        found: Message = {}
        if self._chance(0.4):
            found["tools"] = [self._tool(n) for n in range(self.random.randint(1, 3))]
        if self._chance(0.2):
            found["response_format"] = {"type": "object", "properties": {self.text(): {"x": self.value()}}}
        return found

    def _tool(self, n: int) -> Message:
        parameters = {"type": "object", "properties": {key: {"default": self.value()} for key in _KEYS[:2]}}
        function = {"name": f"f_{n}", "description": self.text(), "parameters": parameters}
        if not self.everywhere and self._chance(0.3):
            function = {"strict": True, **function}
        return {"type": "function", "function": function}

    def _user_turn(self) -> list[Message]:
        messages: list[Message] = []
        if self._chance(0.15):
            messages.append({"role": "latest_reminder", "content": self.text()})
        if not self.everywhere and self._chance(0.1):
            return [*messages, {"role": "developer", "content": "d" + self.text(), **self._declarations()}]
        messages += [self._user() for _ in range(self.random.choice((1, 1, 1, 2)))]
        if not self.everywhere and self._chance(0.15):
            if len(messages) > 1 and messages[-2]["role"] == "user":
                messages.pop()
            messages[-1]["task"] = self.random.choice(_TASKS)
        if not self.everywhere and self._chance(0.05):
            messages.append({"role": "latest_reminder", "content": self.text()})
        return messages

    def _user(self) -> Message:
        if self._chance(0.2):
            parts = [{"type": "text", "text": self.text()} for _ in range(self.random.randint(1, 2))]
            return {"role": "user", "content": [{"type": "text", "text": "u"}, *parts]}
        return {"role": "user", "content": self._user_text(), "name": "ignored"}

    def _user_text(self) -> str:
        return f"u{self.text()}" if self.everywhere else self.text()

    def _assistant_turns(self) -> list[Message]:
        """Rounds of calls and results, then an answer."""
        messages: list[Message] = []
        for _ in range(self.random.choice((0, 0, 0, 1, 2))):
            calls = [self.call() for _ in range(self.random.randint(1, 3))]
            messages.append({**self._assistant(), "tool_calls": calls})
            results = [self._result(call["id"]) for call in calls]
            self.random.shuffle(results)
            if not self.everywhere and self._chance(0.2):
                results.insert(self.random.randrange(len(results) + 1), {"role": "user", "content": self.text()})
            messages += results
        messages.append(self._assistant())
        if not self.everywhere and self._chance(0.05):
            messages[-1]["task"] = "title"
            messages.append({"role": "assistant", "content": self.text()})
        return messages

    def _assistant(self) -> Message:
        message: Message = {"role": "assistant", "content": self.random.choice((self.text(), None, ""))}
        if self._chance(0.7):
            message["reasoning_content"] = self.text()
        if not self.everywhere and self._chance(0.05):
            message["wo_eos"] = True
        return message

    def _result(self, call_id: str) -> Message:
        content: Any = self.text()
        if self._chance(0.2):
            content = [{"type": "text", "text": self.text()}]
            if not self.everywhere:
                content.append({"type": "image_url", "image_url": {"url": "data:,"}})
        return {"role": "tool", "tool_call_id": call_id, "content": content}

    def _assistant_end(self) -> list[Message]:
        if self._chance(0.3):
            return [*self._user_turn(), *self._assistant_turns()]
        user = {"role": "user", "content": self._user_text()}
        reasoning, content = f"r{self.text()}", self.random.choice(("", f"c{self.text()}"))
        return [user, {"role": "assistant", "content": content, "reasoning_content": reasoning, "prefix": True}]


@pytest.fixture(scope="session")
def conversations() -> Callable[..., Conversations]:
    """`Conversations`, by a fixture because test files do not import each other."""
    return Conversations
