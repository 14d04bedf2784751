from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from leadline.serve.reply import PlainText, StopTexts
from leadline.text.events import ContentDelta
from leadline.text.tokenizer import Tokenizer

_LETTERS = st.text("ab", max_size=12)


@given(st.lists(_LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_at_the_first_in_any_split(pieces: list[str], stops: list[str]) -> None:
    reader = StopTexts(stops)
    shown = ""
    for piece in pieces:
        shown += reader.feed(piece)
        if reader.found is not None:
            break
    else:
        shown += reader.finish()
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    if reader.found is None:
        assert not places
        assert shown == whole
    else:
        # A stop text that ends first cuts, even where a longer one has begun before it.
        assert whole.startswith(shown + reader.found)
        assert not any(stop in shown for stop in stops)


def test_text_that_may_become_a_stop_text_waits() -> None:
    reader = StopTexts(["END."])
    assert [reader.feed(text) for text in ("so E", "N", "x", "EN")] == ["so ", "", "ENx", ""]
    assert reader.finish() == "EN"


def test_characters_wait_for_their_bytes_and_control_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("é🌊"), tokenizer.eos_id]
    parser = PlainText(tokenizer)
    events = [event for id in ids for event in parser.feed([id])]
    assert [event.text for event in events if isinstance(event, ContentDelta)] == ["é", "🌊"]
    assert parser.finish() == []
    parser.feed(tokenizer.encode("é")[:1])
    assert parser.finish() == [ContentDelta("\ufffd")]
