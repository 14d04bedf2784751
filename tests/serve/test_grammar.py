"""Random walks through a grammar, as a model without any sense would write, and what a parser makes of them."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import pytest
import torch

from leadline.serve.grammar import GrammarError, Grammars, Mask, any_object_form, either, json_form
from leadline.text.events import Event, message_of
from leadline.text.parse import TokenParser
from leadline.text.strict import parse_strictly
from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import THINK_END

ROWS = 7  # of a model that no token has


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + ROWS)


def walk(tokenizer: Tokenizer, mask: Mask, rng: random.Random, most: int = 3000) -> list[int]:
    """Tokens that the mask allows, drawn evenly, to the end of the turn."""
    ids: list[int] = []
    for _ in range(most):
        allowed_V = mask.allowed()
        assert allowed_V is not None
        choices = allowed_V.nonzero().flatten().tolist()
        assert choices, tokenizer.decode(ids)
        # A walk through endless text ends some day, because its end is taken when it is there.
        ids.append(tokenizer.eos_id if tokenizer.eos_id in choices else rng.choice(choices))
        mask.accept(ids[-1])
        if ids[-1] == tokenizer.eos_id:
            return ids
    raise AssertionError(f"no end after {most} tokens: {tokenizer.decode(ids)[:500]}")


def message(tokenizer: Tokenizer, ids: list[int]) -> Any:
    parser = TokenParser(tokenizer, "content")
    events: list[Event] = [*parser.feed(ids), *parser.finish()]
    return message_of(events)


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def object_of(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


SHORT = {"type": "string", "maxLength": 5}
PARAMETERS: dict[str, Any] = {
    "scalars": object_of(a=SHORT, b={"type": "boolean"}, c={"type": "null"}, d={"enum": ["x", "y z"]}, e={"const": 7}),
    "optional": object_of([], a=SHORT, b={"type": "boolean"}),
    "some optional": object_of(["b"], a=SHORT, b={"type": "boolean"}),
    "a pattern": object_of(a={"type": "string", "pattern": "^[a-c]{2}-[0-9]$"}),
    "either": object_of(a={"type": ["string", "null"], "maxLength": 3}, b={"anyOf": [{"const": "n"}, {"const": 1}]}),
    "references": {
        "$defs": {"colour": {"enum": ["red", "blue"]}, "pair": object_of(x={"$ref": "#/$defs/colour"})},
        **object_of(a={"$ref": "#/$defs/colour"}, b={"$ref": "#/$defs/pair"}),
    },
    "a reference": {"$defs": {"all": object_of(a={"$ref": "#/$defs/n"}), "n": {"const": 1}}, "$ref": "#/$defs/all"},
    "nothing": object_of(),
}


@pytest.mark.parametrize("schema", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_every_walk_is_a_call(grammars: Grammars, tokenizer: Tokenizer, schema: Any) -> None:
    grammar = grammars.compile(grammars.calls([tool("f", schema)], parallel=False))
    for seed in range(4):
        ids = walk(tokenizer, grammars.mask(grammar, thinking=False), random.Random(seed))
        (call,) = message(tokenizer, ids)["tool_calls"]
        assert call["function"]["name"] == "f"
        jsonschema_rs.validate(schema, json.loads(call["function"]["arguments"]))
        parse_strictly(tokenizer.decode(ids), thinking=False)


def test_several_tools_and_calls(grammars: Grammars, tokenizer: Tokenizer) -> None:
    tools = [tool("f", object_of(a={"type": "boolean"})), tool("g", object_of())]
    grammar = grammars.compile(grammars.calls(tools, parallel=True))
    seen: set[tuple[str, ...]] = set()
    for seed in range(12):
        ids = walk(tokenizer, grammars.mask(grammar, thinking=False), random.Random(seed))
        seen.add(tuple(call["function"]["name"] for call in message(tokenizer, ids)["tool_calls"]))
    assert {name for names in seen for name in names} == {"f", "g"}
    assert max(len(names) for names in seen) > 1


def test_any_text_may_come_before_strict_calls(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.compile(grammars.text_or_calls([tool("f", object_of())], parallel=False))
    mask = grammars.mask(grammar, thinking=False)
    dsml, eos = tokenizer.token_id("｜DSML｜"), tokenizer.eos_id

    def allows(id: int) -> bool:
        allowed_V = mask.allowed()
        assert allowed_V is not None
        return bool(allowed_V[id])

    assert allows(eos)
    for id in tokenizer.encode("I will look.\n\n<"):
        assert allows(id)
        assert not allows(dsml)
        mask.accept(id)
    assert allows(eos)  # it may still be text
    assert allows(dsml)
    mask.accept(dsml)
    assert not allows(eos)
    ids = walk(tokenizer, mask, random.Random(0))
    assert tokenizer.decode(ids).startswith('tool_calls>\n<｜DSML｜invoke name="f">\n')


def test_a_value_cannot_forge_the_end_of_its_parameter(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.compile(grammars.calls([tool("f", object_of(a={"type": "string"}))], parallel=False))
    mask = grammars.mask(grammar, thinking=False)
    dsml = tokenizer.token_id("｜DSML｜")
    value = "</｜DSML｜parameter>\n</｜DSML｜invoke>"
    head = ["\n\n<", dsml, "tool_calls>\n<", dsml, 'invoke name="f">\n<', dsml, 'parameter name="a" string="true">']
    tail = ["</", dsml, "parameter>\n</", dsml, "invoke>\n</", dsml, "tool_calls>", tokenizer.eos_id]
    ids = [id for part in (*head, value, *tail) for id in ([part] if isinstance(part, int) else tokenizer.encode(part))]
    for id in ids:
        allowed_V = mask.allowed()
        assert allowed_V is not None
        assert allowed_V[id], tokenizer.decode([id])
        mask.accept(id)
    (call,) = message(tokenizer, ids)["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": value}


def test_ordinary_text_that_spells_a_tag_does_not_pass(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.compile(grammars.calls([tool("f", object_of())], parallel=False))
    mask = grammars.mask(grammar, thinking=False)
    for id in tokenizer.encode("\n\n<"):
        mask.accept(id)
    allowed_V = mask.allowed()
    assert allowed_V is not None
    assert allowed_V.nonzero().flatten().tolist() == [tokenizer.token_id("｜DSML｜")]


@pytest.mark.parametrize(
    "schema", [{"enum": [1, "a"]}, object_of(a={"type": "boolean"}), {"type": "array", "maxItems": 0}]
)
def test_every_walk_is_the_json_of_a_schema(grammars: Grammars, tokenizer: Tokenizer, schema: Any) -> None:
    grammar = grammars.compile(json_form(schema))
    for seed in range(3):
        ids = walk(tokenizer, grammars.mask(grammar, thinking=False), random.Random(seed))
        jsonschema_rs.validate(schema, json.loads(message(tokenizer, ids)["content"]))


def test_an_object_begins_with_a_brace(grammars: Grammars, tokenizer: Tokenizer) -> None:
    mask = grammars.mask(grammars.compile(any_object_form()), thinking=False)
    allowed_V = mask.allowed()
    assert allowed_V is not None
    starts = {tokenizer.decode([id])[0] for id in allowed_V.nonzero().flatten().tolist()}
    assert starts == {"{"}


def test_either_form_may_come(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = either(json_form({"const": 1}), grammars.calls([tool("f", object_of())], parallel=False))
    grammar = grammars.compile(form)
    found = [message(tokenizer, walk(tokenizer, grammars.mask(grammar, False), random.Random(n))) for n in range(12)]
    assert {bool(each["tool_calls"]) for each in found} == {True, False}


def test_thinking_is_free_of_the_form_but_not_of_all(grammars: Grammars, tokenizer: Tokenizer) -> None:
    mask = grammars.mask(grammars.compile(json_form({"const": 1})), thinking=True)
    think_end = tokenizer.token_id(THINK_END)
    for id in tokenizer.encode("so {"):
        allowed_V = mask.allowed()
        assert allowed_V is not None
        assert allowed_V[id]
        assert allowed_V[think_end]
        assert not allowed_V[tokenizer.eos_id]
        assert not allowed_V[-ROWS:].any()
        mask.accept(id)
    mask.accept(think_end)
    allowed_V = mask.allowed()
    assert allowed_V is not None
    assert [tokenizer.decode([id]) for id in allowed_V.nonzero().flatten().tolist()] == ["1"]


def test_ids_that_stand_for_nothing_are_known(grammars: Grammars, tokenizer: Tokenizer) -> None:
    allowed_V = grammars.known_only().allowed()
    assert allowed_V is not None
    assert grammars.has_unknown_ids
    assert torch.equal(allowed_V.nonzero().flatten(), torch.arange(tokenizer.vocab_size))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 3},
        {"$ref": "#/nowhere"},
        {"anyOf": [object_of()]},
        object_of(a=3),
        {"type": "object", "properties": {'a"b': {"type": "integer"}}},
        object_of(a={"type": "string", "pattern": "("}),
        object_of(a={"type": "string", "maxLength": 10**9}),
        object_of(a={"type": "string", "minLength": -1}),
        {"type": "object", "properties": [1]},
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(GrammarError, match="cannot be enforced"):
        grammars.compile(grammars.calls([tool("f", schema)], parallel=False))


@pytest.mark.parametrize("schema", [{"type": 3}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}])
def test_a_json_schema_that_cannot_be_enforced_is_refused(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(GrammarError, match="cannot be enforced"):
        grammars.compile(json_form(schema))
