"""Grammar: answers that must have a form, enforced token by token.

A model asked for JSON mostly writes JSON. `response_format` and `tool_choice` promise more: before each token, a
grammar says which tokens can still lead to an answer of the right form, and no other can be drawn. xgrammar compiles
JSON schemas to such grammars and computes the masks.

Calls are markup in which the control token `｜DSML｜` stands between ordinary text (`leadline/text/tools.py`). The
grammar names that token by its id, and no text in it can match a control token, so neither can a value forge the end of
its parameter nor ordinary tokens spell a tag that the parser would then take for text. A parameter that is a string is
raw text up to the end tag; every other value is JSON that the parameter's schema describes.

While the model thinks it is free: everything but control tokens may come, until it ends its thinking. The form begins
there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import xgrammar
from torch import Tensor

from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import DSML, THINK_END

Format = dict[str, Any]
"""A part of a grammar, in xgrammar's structural tags."""
Schema = Mapping[str, Any]

# White space between the parts of a JSON value: enough for deep indentation, and not without end.
_MOST_SPACE = 40
# Characters that a grammar counts one by one.
_MOST_COUNTED = 4096
_ANY_TEXT = r"[\s\S]*"
_ANY_OBJECT: Schema = {"type": "object"}


class GrammarError(ValueError):
    """A form that cannot be enforced; one line that names it."""


class Grammars:
    """Compiles forms for one tokenizer. vocab_size: of the model, which may have more rows than there are tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._dsml_id = tokenizer.token_id(DSML)
        self._think_end_id = tokenizer.token_id(THINK_END)
        self.known_V, self._text_V = _kinds(tokenizer, vocab_size)

    @property
    def has_unknown_ids(self) -> bool:
        """Whether the model can draw ids that stand for nothing."""
        return not bool(self.known_V.all())

    @cached_property
    def _compiler(self) -> xgrammar.GrammarCompiler:
        # A control token gets bytes that no text has, so that only its id can mean it.
        vocabulary = [
            self._tokenizer.token_bytes(id) or b"\xff\xfe%d" % id if self.known_V[id] else b""
            for id in range(self._vocab_size)
        ]
        info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[self._tokenizer.eos_id], vocab_size=self._vocab_size)
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=64 * 2**20)

    def compile(self, form: Format) -> xgrammar.CompiledGrammar:
        """Slow for a large form: not for the event loop. Raises GrammarError."""
        try:
            return self._compiler.compile_structural_tag(json.dumps({"type": "structural_tag", "format": form}))
        except (RuntimeError, ValueError, TypeError, RecursionError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise GrammarError(f"the schema cannot be enforced: {reason}") from None

    def mask(self, grammar: xgrammar.CompiledGrammar, thinking: bool) -> Mask:
        """The mask of one answer. thinking: whether the answer begins with thinking, where the form does not apply."""
        free_V = None
        if thinking:
            free_V = self._text_V.clone()
            free_V[self._think_end_id] = True
        return Mask(grammar, self._vocab_size, free_V, self._think_end_id)

    def known_only(self) -> KnownOnly:
        """The mask that keeps a model to ids that stand for something."""
        return KnownOnly(self.known_V)

    def calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> Format:
        """The form of a reply that calls one of the tools, or several. tools: in OpenAI's form."""
        invokes = [self._invoke(tool["function"]) for tool in tools]
        one = invokes[0] if len(invokes) == 1 else _any_of(*invokes)
        some: Format = {"type": "plus", "content": one} if parallel else one
        return _sequence("\n\n<", self._dsml, "tool_calls>\n", some, "</", self._dsml, "tool_calls>")

    def text_or_calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> Format:
        """The form of a reply that says what it likes, and whose calls, if it ends with some, are as in `calls`."""
        calls: Format = {"type": "optional", "content": self.calls(tools, parallel)}
        return _sequence({"type": "regex", "pattern": _ANY_TEXT}, calls)

    @property
    def _dsml(self) -> Format:
        return {"type": "token", "token": self._dsml_id}

    def _invoke(self, function: Mapping[str, Any]) -> Format:
        schema: Schema = function.get("parameters") or _ANY_OBJECT
        inside = self._parameters(schema)
        return _sequence("<", self._dsml, f'invoke name="{function["name"]}">\n', inside, "</", self._dsml, "invoke>\n")

    def _parameters(self, schema: Schema) -> Format:
        """All parameters of a call, each on its line, in the schema's order; a call without any has an empty line."""
        root, schema = schema, _resolved(schema, schema)
        strange = next((key for key in ("$ref", "anyOf", "oneOf", "allOf", "not", "if") if key in schema), None)
        if strange is not None or schema.get("type", "object") != "object":
            found = strange or f"type {schema['type']!r}"
            raise GrammarError(
                f"the schema cannot be enforced: parameters are {found}, expected an object's properties"
            )
        properties = schema.get("properties")
        if not properties:
            closed = schema.get("additionalProperties") is False or properties == {}
            any_value = _any_of(*(self._parameter(None, part) for part in ({"type": "string"}, {})))
            return (
                _text("\n") if closed else _any_of(_text("\n"), {"type": "plus", "content": _sequence(any_value, "\n")})
            )
        if not isinstance(properties, Mapping):
            raise GrammarError("the schema cannot be enforced: properties is no object")
        required = schema.get("required") or []
        lines: list[Format] = []
        for name, part in properties.items():
            branches = [self._parameter(name, branch) for branch in _branches(part, root)]
            line = _sequence(branches[0] if len(branches) == 1 else _any_of(*branches), "\n")
            lines.append(line if name in required else {"type": "optional", "content": line})
        whole = _sequence(*lines)
        return whole if any(name in required for name in properties) else _any_of(_text("\n"), whole)

    def _parameter(self, name: str | None, schema: Schema) -> Format:
        raw = schema.get("type") == "string"
        flag = "true" if raw else "false"
        if name is not None and ('"' in name or "\n" in name):
            raise GrammarError(f"the schema cannot be enforced: the parameter {name!r} has a quote or a line break")
        head: list[str | Format] = ["<", self._dsml, 'parameter name="']
        head += [{"type": "regex", "pattern": r'[^"\n]{1,64}'} if name is None else name, f'" string="{flag}">']
        value = _raw_text(schema) if raw else json_form(schema)
        return _sequence(*head, value, "</", self._dsml, "parameter>")


class Mask:
    """A grammar on its way through one answer; the engine's `TokenMask`."""

    def __init__(self, grammar: xgrammar.CompiledGrammar, vocab_size: int, free_V: Tensor | None, think_end_id: int):
        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._vocab_size, self._free_V, self._think_end_id = vocab_size, free_V, think_end_id
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> Tensor | None:
        """bool [V]: the tokens that may come next; None behind the end of the turn."""
        if self._free_V is not None or self._matcher.is_terminated():
            return self._free_V
        xgrammar.reset_token_bitmask(self._bits)
        self._matcher.fill_next_token_bitmask(self._bits)
        shifts = torch.arange(32, dtype=torch.int32)
        return ((self._bits[0][:, None] >> shifts) & 1).bool().flatten()[: self._vocab_size]

    def accept(self, token: int) -> None:
        """The token that was drawn."""
        if self._free_V is not None:
            if token == self._think_end_id:
                self._free_V = None
            return
        if not self._matcher.is_terminated():
            self._matcher.accept_token(token)


class KnownOnly:
    """Allows every id that stands for a token; for models with more rows than their tokenizer has tokens."""

    def __init__(self, known_V: Tensor):
        self._known_V = known_V

    def allowed(self) -> Tensor | None:
        return self._known_V

    def accept(self, token: int) -> None:
        """Nothing depends on it."""


def json_form(schema: Schema) -> Format:
    """The form of a JSON value that a schema describes."""
    return {"type": "json_schema", "json_schema": dict(schema), "max_whitespace_cnt": _MOST_SPACE}


def any_object_form() -> Format:
    """The form of any JSON object."""
    return json_form({"type": "object", "additionalProperties": True})


def either(*forms: Format) -> Format:
    """One form or another."""
    return forms[0] if len(forms) == 1 else _any_of(*forms)


def _text(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _sequence(*parts: str | Format) -> Format:
    return {"type": "sequence", "elements": [_text(part) if isinstance(part, str) else part for part in parts]}


def _any_of(*parts: Format) -> Format:
    return {"type": "or", "elements": list(parts)}


def _kinds(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tensor, Tensor]:
    """bool [V] twice: ids that stand for a token, and those of them that are text."""
    known_V = torch.zeros(vocab_size, dtype=torch.bool)
    text_V = known_V.clone()
    lengths_V = torch.from_numpy(tokenizer.token_bytes_V)
    text_V[: len(lengths_V)] = lengths_V > 0
    for id in range(len(lengths_V)):
        known_V[id] = text_V[id] or tokenizer.control_token(id) is not None
    return known_V, text_V


# -- schemas of parameters --------------------------------------------------------------------------------------


def _branches(part: Any, root: Schema) -> list[Schema]:
    """The kinds of value that a parameter may have, each with the root's definitions, so that references still lead
    somewhere. Strings stand apart from all others, because they are written without quotes."""
    schema = _resolved(part, root)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return [branch for each in schema[key] for branch in _branches(each, root)]
    kinds = schema.get("type")
    if isinstance(kinds, list) and "string" in kinds:
        others = [kind for kind in kinds if kind != "string"]
        branches = [{**schema, "type": "string"}, {**schema, "type": others}]
        schemas = branches if others else branches[:1]
    elif kinds is None and _only_strings(schema):
        schemas = [{**schema, "type": "string"}]
    else:
        schemas = [schema]
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return [{**definitions, **each} for each in schemas]


def _resolved(part: Any, root: Schema) -> Schema:
    if part is True:
        return {}
    if not isinstance(part, Mapping):
        raise GrammarError("the schema cannot be enforced: a parameter's schema is no object")
    match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(part.get("$ref", "")))
    target = root.get(match[1], {}).get(match[2]) if match and isinstance(root.get(match[1]), Mapping) else None
    return target if isinstance(target, Mapping) and "$ref" not in target else part


def _only_strings(schema: Schema) -> bool:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return bool(values) and isinstance(values, list) and all(isinstance(value, str) for value in values)


def _raw_text(schema: Schema) -> Format:
    """A string as it is, without quotes."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values:
        return either(*(_text(value) for value in values if isinstance(value, str)))
    if isinstance(schema.get("pattern"), str):
        return {"type": "regex", "pattern": schema["pattern"]}
    fewest, most = (_length(schema, key) for key in ("minLength", "maxLength"))
    times = f"{{{fewest or 0},{'' if most is None else most}}}" if fewest or most is not None else "*"
    return {"type": "regex", "pattern": rf"[\s\S]{times}"}


def _length(schema: Schema, key: str) -> int | None:
    value = schema.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value <= _MOST_COUNTED:
        raise GrammarError(f"the schema cannot be enforced: {key} is {value!r}, expected 0 to {_MOST_COUNTED:,}")
    return value
