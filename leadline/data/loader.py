"""Loader: shards to batches, shuffled by epoch and resumable at any batch.

A batch is one packed bin as a `Segment`: every piece is a sequence of its own with nothing before it, so attention
never crosses from one document into another.

The model reads a token and predicts the next one, so a document of n tokens offers n - 1 predictions. Packing therefore
works on the first n - 1 tokens, the ones that are read; a piece that reads tokens start..stop-1 has the targets
start+1..stop. No row lacks a target, also where a long document is cut: the piece's last target is then the first token
that the next piece reads. Over an epoch every token except BOS is a target exactly once.

All randomness comes from (seed, epoch), and the order of an epoch is worked out when it begins. So the position in the
stream is two numbers, and a loader that takes them up again goes on with bitwise the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leadline.data.pack import Piece, pack
from leadline.data.shards import Shards
from leadline.model.segment import Segment
from leadline.text.tokenizer import Tokenizer


class LoaderError(ValueError):
    """A loader's settings or its saved state do not fit; one line that says what differs."""


@dataclass(frozen=True)
class Batch:
    """What one training or evaluation step reads.

    segment: the tokens read, every past 0, one sequence for each packed piece.
    targets_T: int64, the token that follows each token read, in the same document.
    num_bytes: UTF-8 bytes of text that the targets stand for. Bits per byte of a stretch of text is the sum of the
        negative log2 likelihoods of its targets over the sum of their bytes; EOS costs bits and stands for no byte.
    """

    segment: Segment
    targets_T: Tensor
    num_bytes: int


class Loader:
    """An endless stream of batches of at most `tokens_per_batch` tokens, each epoch in a new order.

    Raises ShardError if the shards are not written in the tokenizer's vocabulary, LoaderError for impossible settings.
    """

    def __init__(self, shards: Shards, tokenizer: Tokenizer, tokens_per_batch: int, seed: int = 0) -> None:
        shards.require_tokenizer(tokenizer)
        _require_capacity(tokens_per_batch)
        if seed < 0:
            raise LoaderError(f"seed = {seed}: must not be negative")
        self._shards = shards
        self._token_bytes_V = tokenizer.token_bytes_V
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._bins, self._epoch, self._position = self._bins_of_epoch(0), 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._position == len(self._bins):
            self._epoch, self._position = self._epoch + 1, 0
            self._bins = self._bins_of_epoch(self._epoch)
        batch = _read_batch(self._shards, self._bins[self._position], self._token_bytes_V)
        self._position += 1
        return batch

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """Batches already given in the current epoch."""
        return self._position

    @property
    def batches_in_epoch(self) -> int:
        """Batches of the current epoch; other epochs may have a few more or fewer."""
        return len(self._bins)

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, and what it depends on; plain numbers and text, fit for JSON."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises LoaderError, and changes nothing, if that is not possible."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise LoaderError(
                    f"cannot resume the data stream: {name} was {state.get(name)!r} and is now {value!r}; "
                    f"restore it or start a new run"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0:
            raise LoaderError(f"cannot resume the data stream: saved at epoch {epoch!r}, position {position!r}")
        bins = self._bins_of_epoch(epoch)
        if not 0 <= position <= len(bins):
            raise LoaderError(f"cannot resume the data stream: saved at batch {position} of {len(bins)}")
        self._bins, self._epoch, self._position = bins, epoch, position

    def _identity(self) -> dict[str, Any]:
        """What the stream depends on."""
        return {"shards": self._shards.fingerprint, "tokens_per_batch": self._tokens_per_batch, "seed": self._seed}

    def _bins_of_epoch(self, epoch: int) -> list[list[Piece]]:
        documents = _permutation(self._shards.num_documents, self._seed, epoch, stage=0)
        bins = list(pack(_read_lengths(self._shards, documents), self._tokens_per_batch))
        # Packing puts the emptiest bin of each buffer last; a second shuffle leaves no pattern over the epoch.
        order = _permutation(len(bins), self._seed, epoch, stage=1)
        return [bins[number] for number in order.tolist()]


def single_pass(shards: Shards, tokenizer: Tokenizer, tokens_per_batch: int) -> Iterator[Batch]:
    """Every document once, in the order of the shards as far as packing allows: for held-out text.

    Raises like `Loader`.
    """
    shards.require_tokenizer(tokenizer)
    _require_capacity(tokens_per_batch)
    bins = pack(_read_lengths(shards, np.arange(shards.num_documents)), tokens_per_batch)
    return (_read_batch(shards, pieces, tokenizer.token_bytes_V) for pieces in bins)


def _require_capacity(tokens_per_batch: int) -> None:
    if tokens_per_batch < 1:
        raise LoaderError(f"tokens_per_batch = {tokens_per_batch}: must be at least 1")


def _read_lengths(shards: Shards, documents: np.ndarray) -> Iterable[tuple[int, int]]:
    """(document, tokens that the model reads of it): all but the last."""
    return zip(documents.tolist(), (shards.lengths[documents] - 1).tolist(), strict=True)


def _read_batch(shards: Shards, pieces: list[Piece], token_bytes_V: np.ndarray) -> Batch:
    rows = [shards.tokens(piece.document, piece.start, piece.stop + 1) for piece in pieces]
    tokens_T = np.concatenate([row[:-1] for row in rows]).astype(np.int64)
    targets_T = np.concatenate([row[1:] for row in rows]).astype(np.int64)
    segment = Segment(
        tokens_T=torch.from_numpy(tokens_T),
        lengths=tuple(piece.length for piece in pieces),
        past=(0,) * len(pieces),
        slots=tuple(range(len(pieces))),
    )
    return Batch(segment, torch.from_numpy(targets_T), num_bytes=int(token_bytes_V[targets_T].sum()))


def _permutation(size: int, seed: int, epoch: int, stage: int) -> np.ndarray:
    """A random order of 0..size-1, the same on every machine.

    Sorts raw generator output, because numpy promises that stream for all versions and its `permutation` for none.
    """
    generator = np.random.PCG64(np.random.SeedSequence([seed, epoch, stage]))
    return np.argsort(generator.random_raw(size), kind="stable")
