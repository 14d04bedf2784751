"""Tokenizer: text to token ids and back, by byte-level BPE in the layout of DeepSeek-V4.

How V4 cuts text (the official `tokenizer.json`):

1. No normalisation: every byte of the text survives, so decoding gives the very text back.
2. Pre-tokenisation: three regular expressions, one after the other, each setting its matches apart. Digits come in
   groups of at most three, runs of Chinese and Japanese characters stand alone, then words (with one leading space or
   sign), signs, and white space. BPE never merges across these cuts.
3. Each piece becomes its UTF-8 bytes, each byte one of 256 printable characters, and BPE merges pairs of these. The 256
   characters are always in the vocabulary, so there is no unknown token.
4. *Control tokens* (`<｜User｜>`, `<think>`, ...) are not learned. They mark structure: where a document starts, who
   speaks. Ids 0, 1 and 2 are the frame of a document (begin, end, padding); the others follow the learned tokens.

A control token's spelling inside ordinary text must not act as the control token, or whoever writes the text could end
a turn or open a system prompt. The `tokenizers` library has a switch for this (`encode_special_tokens`), but it covers
only tokens flagged *special*, and the official file flags `<｜User｜>`, `<think>` and most others as not special. So a
`Tokenizer` holds two views of one BPE model: a literal view that knows no control token, which is the default, and a
parsing view for text that a trusted template wrote (`allow_special=True`).
"""

# V4's control tokens are spelled with full-width bars, which ruff takes for mistyped ASCII.

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"

# In the order of the official ids, with the official spelling: U+FF5C for the bars, U+2581 for the low lines.
SPECIAL_TOKENS = (
    BOS_TOKEN,  # opens every document and every conversation (official id 0)
    EOS_TOKEN,  # closes a document, and every assistant turn (1)
    "<｜▁pad▁｜>",  # fills rows in engines that pad; leadline never does (2)
    "<｜fim▁hole｜>",  # fill-in-the-middle: where the missing middle belongs (128800)
    "<｜fim▁begin｜>",  # fill-in-the-middle: before the prefix (128801)
    "<｜fim▁end｜>",  # fill-in-the-middle: after the suffix, the middle follows (128802)
    "<｜User｜>",  # opens a user turn (128803)
    "<｜Assistant｜>",  # opens an assistant turn (128804)
    "<think>",  # opens the reasoning part of an assistant turn (128821)
    "</think>",  # closes it; directly after the Assistant token it means "answer without reasoning" (128822)
    "｜DSML｜",  # inside angle brackets: a tag of the tool-call markup, not text that looks like one (128825)
    "<｜latest_reminder｜>",  # a note of the application between the system prompt and the user turn (128828)
    "<｜action｜>",  # task, after the assistant's reasoning: choose an action (128829)
    "<｜query｜>",  # task, after the user's text: write search queries (128830)
    "<｜authority｜>",  # task, after the user's text: does it need an authoritative source (128831)
    "<｜domain｜>",  # task, after the user's text: name its domain (128832)
    "<｜title｜>",  # task, after the assistant's end: name the conversation (128836)
    "<｜extracted_url｜>",  # marks an address taken from the user's text (128844)
    "<｜read_url｜>",  # task, after the user's text: decide whether to read its addresses (128845)
)

# The frame of a document, ids 0..2. The official file flags these as special and the other control tokens not: decoding
# without special tokens drops the frame and keeps the marks that a reply's parser needs, such as </think>.
_NUM_FRAME_TOKENS = 3

_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())

# Byte-level BPE writes a printable byte as the character of that code, and the others as U+0100 and up, in their order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))
}

# V4's three cuts, verbatim from the official file; in the second, the ideographs U+4E00 to U+9FA5 and both kana blocks.
_DIGITS = r"\p{N}{1,3}"
_IDEOGRAPHS = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_WORDS_SIGNS_SPACE = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

Progress = Callable[[int, int | None], None]
"""Called with (done, total); total is None where it is not known in advance."""


class TokenizerError(ValueError):
    """A tokenizer file or a text cannot be used; one line that names it and says what to do."""


class Control(str):
    """A control token by its spelling. Prompts are lists of pieces: a `Control` is that token, any other `str` text."""

    __slots__ = ()


class Tokenizer:
    """Byte-level BPE with control tokens; made by `load` or `train`."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], name: str) -> None:
        """backend: the parsing view. config: content of `tokenizer_config.json`. name: what errors call it."""
        # A file may carry a length limit or padding from whoever saved it; here both would alter text unasked.
        backend.no_truncation()
        backend.no_padding()
        self._parsing = backend
        self._literal = tokenizers.Tokenizer(backend.model)  # shares the model's memory
        if backend.normalizer is not None:
            self._literal.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._literal.pre_tokenizer = backend.pre_tokenizer
        self._config = dict(config)
        self._name = name
        self._control = {token.content: id for id, token in backend.get_added_tokens_decoder().items()}
        self._control_by_id = {id: Control(token) for token, id in self._control.items()}
        self._require_literal_view_reaches_no_control_token()
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    # -- making -----------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder, and the `tokenizer_config.json` beside it if there is one.

        Raises TokenizerError for a missing or corrupt file.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        text = _read(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise TokenizerError(f"{path}: not a usable tokenizer.json ({error}); fetch or save it again") from None
        config_path = path.with_name("tokenizer_config.json")
        config = _read_config(config_path) if config_path.exists() else {}
        return cls(backend, config, name=str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: Progress | None = None) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens, control tokens included, from texts.

        Deterministic: equal texts in equal order give an equal tokenizer. Texts too short to hold enough distinct pairs
        give fewer tokens; read `vocab_size` of the result. `progress` counts texts read; the merging after the last
        text is not reported.
        """
        smallest = len(_ALPHABET) + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size = {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} control tokens "
                f"need at least {smallest}"
            )
        frame, marks = SPECIAL_TOKENS[:_NUM_FRAME_TOKENS], SPECIAL_TOKENS[_NUM_FRAME_TOKENS:]
        backend = _empty_backend()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(marks),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in frame],
            initial_alphabet=sorted(_ALPHABET),
            show_progress=False,
        )
        backend.train_from_iterator(_counted(texts, progress), trainer)
        backend.add_tokens(  # pyright: ignore[reportUnknownMemberType]  # the library's stub says only "list"
            [AddedToken(token, special=False, normalized=True) for token in marks]
        )
        return cls(backend, _official_config(), name="trained tokenizer")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, each in one step: a reader never sees half a file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self._config or _official_config(), indent=2, ensure_ascii=False)
        _write_atomically(folder / "tokenizer_config.json", config + "\n")
        _write_atomically(folder / "tokenizer.json", self._parsing.to_str(pretty=True) + "\n")

    # -- text to ids and back ---------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text, without BOS or EOS.

        allow_special: read the spellings of control tokens as control tokens. Only for text that a trusted template
        wrote; by default every character is ordinary text.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores. Needs about 100 bytes of memory per token while it runs."""
        view = self._parsing if allow_special else self._literal
        try:
            encodings = view.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                _require_utf8(text)
            raise
        return [encoding.ids for encoding in encodings]

    def encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        """Token ids of a prompt: each `Control` becomes its token, every other piece is text that cannot forge one.

        Neighbouring texts are encoded as one, so the ids do not depend on how a text was cut into pieces.
        """
        controls: list[int] = []
        texts: list[list[str]] = [[]]
        for piece in pieces:
            if isinstance(piece, Control):
                controls.append(self.token_id(piece))
                texts.append([])
            else:
                texts[-1].append(piece)
        first, *others = self.encode_batch(["".join(text) for text in texts])
        for control, ids in zip(controls, others, strict=True):
            first.append(control)
            first.extend(ids)
        return first

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8, such as half a character, become U+FFFD.

        skip_special: leave out the tokens that the file flags as special. In V4's files these are BOS, EOS and padding;
        the marks inside a conversation stay, because a reply cannot be parsed without them.
        """
        ids = list(ids)
        for id in ids:
            self._require_in_vocabulary(id)
        return self._parsing.decode(ids, skip_special_tokens=skip_special)

    # -- the vocabulary ---------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Largest id plus 1 [V]; a model needs at least so many embedding rows."""
        return self._vocab_size

    @property
    def bos_id(self) -> int:
        """Id of the token that opens a document."""
        return self._frame_id("bos_token", BOS_TOKEN)

    @property
    def eos_id(self) -> int:
        """Id of the token that closes a document."""
        return self._frame_id("eos_token", EOS_TOKEN)

    def token_id(self, token: str) -> int:
        """Id of a control token by its spelling."""
        if token not in self._control:
            raise TokenizerError(f"{self._name}: has no control token {token!r}; it needs V4's special tokens")
        return self._control[token]

    def control_token(self, id: int) -> Control | None:
        """The control token of an id, or None if the id stands for text."""
        return self._control_by_id.get(id)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of text that one id stands for, perhaps a part of a character; none for a control token."""
        self._require_in_vocabulary(id)
        if id in self._control_by_id:
            return b""
        token = self._parsing.id_to_token(id)
        if token is None:
            raise TokenizerError(f"{self._name}: id {id} stands for no token; a model must not sample it")
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:
            raise self._not_bytes(token) from None

    @cached_property
    def token_bytes_V(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int64 [V]; control tokens stand for none.

        Over the ids of a text the sum is the text's length in bytes: the denominator of bits per byte.
        """
        control = set(self._control.values())
        bytes_V = np.zeros(self._vocab_size, dtype=np.int64)
        for token, id in self._parsing.get_vocab(with_added_tokens=True).items():
            if id in control:
                continue
            if not _ALPHABET.issuperset(token):
                raise self._not_bytes(token)
            bytes_V[id] = len(token)
        return bytes_V

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what each id stands for. Token files made under another fingerprint mean other text."""
        control = set(self._control.values())
        vocabulary = sorted((id, token) for token, id in self._parsing.get_vocab(with_added_tokens=True).items())
        content = json.dumps([[id, token, id in control] for id, token in vocabulary])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    # -- inside -----------------------------------------------------------------------------------------------

    def _require_in_vocabulary(self, id: int) -> None:
        if not 0 <= id < self._vocab_size:
            raise TokenizerError(
                f"{self._name}: id {id} is outside the vocabulary of {self._vocab_size} tokens; "
                f"a model with more rows must not sample the unused ones"
            )

    def _not_bytes(self, token: str) -> TokenizerError:
        return TokenizerError(
            f"{self._name}: token {token!r} is not spelled in bytes; its text is unknown; use a byte-level BPE"
        )

    def _frame_id(self, key: str, default: str) -> int:
        token = self._config.get(key)
        if isinstance(token, Mapping):  # the official file writes an object, others a plain string
            token = cast("Mapping[str, Any]", token).get("content")
        return self.token_id(token if isinstance(token, str) else default)

    def _require_literal_view_reaches_no_control_token(self) -> None:
        """Some models list control tokens among the learned ones, and would find them in plain text."""
        for (token, id), encoding in zip(
            self._control.items(),
            self._literal.encode_batch_fast(list(self._control), add_special_tokens=False),
            strict=True,
        ):
            if id in encoding.ids:
                raise TokenizerError(
                    f"{self._name}: plain text {token!r} becomes the control token {id}; "
                    f"use a byte-level BPE whose merges do not spell its control tokens"
                )


def _empty_backend() -> tokenizers.Tokenizer:
    """V4's pipeline around a BPE model that has learned nothing yet."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(Regex(pattern), behavior="isolated")
                for pattern in (_DIGITS, _IDEOGRAPHS, _WORDS_SIGNS_SPACE)
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Acts on character offsets only, which leadline never reads; the flags are the official file's.
    backend.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _official_config() -> dict[str, Any]:
    """`tokenizer_config.json` as the released checkpoints have it."""

    def token(content: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": token(BOS_TOKEN),
        "clean_up_tokenization_spaces": False,
        "eos_token": token(EOS_TOKEN),
        "legacy": True,
        "model_max_length": 1048576,
        "pad_token": token(EOS_TOKEN),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _counted(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    total = len(texts) if isinstance(texts, Sized) else None
    for done, text in enumerate(texts, start=1):
        _require_utf8(text)
        yield text
        if progress is not None:
            progress(done, total)


def _require_utf8(text: str) -> None:
    try:
        text.encode("utf8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text has no UTF-8 form: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            f"remove or replace it"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file; a checkpoint folder holds a tokenizer.json") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text ({error}); fetch or save it again") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); fetch or save it again") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: holds a {type(config).__name__}, expected a JSON object")
    return cast("dict[str, Any]", config)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
