from __future__ import annotations

from leadline.serve.blocks import Blocks
from leadline.text.events import ArgumentsDelta, CallBegin, CallEnd, ContentDelta, EndOfTurn, ReasoningDelta


def test_parts_open_grow_and_close_in_their_order() -> None:
    blocks = Blocks()
    changes = blocks.feed([ReasoningDelta("h"), ReasoningDelta("m"), ContentDelta("a"), CallBegin(0, "f")])
    changes += blocks.feed([ArgumentsDelta(0, '{"x": '), ArgumentsDelta(0, "1}"), CallEnd(0), ContentDelta("b")])
    changes += blocks.feed([CallBegin(1, "g"), ArgumentsDelta(1, '{"y'), EndOfTurn()])
    changes += blocks.finish()
    assert [(change, block.index) for change, block, _ in changes if change != "delta"] == [
        (change, index) for index in range(5) for change in ("open", "close")
    ]
    assert [(block.kind, block.text) for block in blocks.all] == [
        ("reasoning", "hm"),
        ("content", "a"),
        ("call", '{"x": 1}'),
        ("content", "b"),
        ("call", '{"y'),
    ]
    assert [block.complete for block in blocks.all] == [True, True, True, True, False]
    assert blocks.all[2].arguments == {"x": 1}


def test_nothing_said_is_no_block() -> None:
    blocks = Blocks()
    assert blocks.feed([EndOfTurn()]) == blocks.finish() == blocks.all == []
