"""A small random model with its tokenizer, and an engine that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from leadline.engine.request import Request, RequestError
from leadline.engine.sequence import Event, Finish, Token, Usage
from leadline.model.config import TINY, ModelConfig
from leadline.model.transformer import Transformer
from leadline.text.tokenizer import Control, Tokenizer
from leadline.weights.save import save_checkpoint
from leadline.weights.synthetic import few_layers

TEXT = "def add(first, second):\n    return first + second\n\n# **bold** and `code`, 123 and 中文\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 400)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return written(tmp_path_factory.mktemp("model"), TINY.replace(vocab_size=tokenizer.vocab_size), tokenizer)


@pytest.fixture(scope="session")
def staged_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """With draft stages in the place of the MTP block."""
    config = few_layers(TINY.replace(vocab_size=tokenizer.vocab_size), TINY.num_hidden_layers, draft_stages=True)
    return written(tmp_path_factory.mktemp("staged"), config, tokenizer)


def written(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    tokenizer.save(folder / "tokenizer")
    generator = torch.Generator().manual_seed(3)
    model = Transformer(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.random_(0, config.n_routed_experts, generator=generator)
            elif "norm" in name:
                tensor.uniform_(0.8, 1.2, generator=generator)
            else:
                tensor.normal_(0, 0.3, generator=generator)
    tokenizer_files = sorted((folder / "tokenizer").iterdir())
    save_checkpoint(model, config, folder / "checkpoint", tokenizer_files=tokenizer_files)
    return folder / "checkpoint"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("a.py", "b.py"):
        (folder / name).write_text(TEXT * 8)
    (folder / "logo.png").write_bytes(b"\0")
    return folder


class Scripted:
    """Stands in for an engine: after the prompt, in steps of 100 tokens, it says the given tokens one by one."""

    cache_bytes = 2**20
    max_tokens = 4096

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.requests: list[Request] = []
        self.on_step: Callable[[int], None] = lambda said: None
        self.busy = False
        self._said = self._seen = 0
        self._cancelled = False

    def submit(self, request: Request) -> int:
        if len(request.prompt) >= self.max_tokens:
            raise RequestError("too long")
        self.requests.append(request)
        self._said = self._seen = 0
        self._cancelled = False
        self.busy = True
        return len(self.requests)

    def cancel(self, number: int) -> None:
        self._cancelled = True

    def seen(self, number: int) -> int:
        return self._seen if self.busy else 0

    def usage(self, number: int) -> Usage:
        return Usage(len(self.requests[-1].prompt), self._said, 0)

    def step(self) -> list[Event]:
        self.on_step(self._said)
        prompt_tokens = len(self.requests[-1].prompt)
        if self._cancelled:
            self.busy = False
            return [Event(0, finish=Finish.CANCELLED)]
        if self._seen < prompt_tokens:
            self._seen = min(self._seen + 100, prompt_tokens)
            return []
        token = self.tokens[self._said]
        self._said += 1
        self.busy = self._said < len(self.tokens)
        return [Event(0, (Token(token),), None if self.busy else Finish.STOP)]


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., Scripted]:
    """scripted("text", Control("</think>"), ...): an engine that says this."""
    return lambda *pieces: Scripted(tokenizer.encode_pieces(pieces))


@pytest.fixture
def reply(scripted: Callable[..., Scripted]) -> Scripted:
    """Thinks, then answers in Markdown."""
    end = Control("</think>")
    return scripted("Adding\nup.", end, "# Sum\n\nIt is **4**.\n\n- one\n- two", Control("<｜end▁of▁sentence｜>"))
