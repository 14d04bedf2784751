"""What a folder holds, under our names: any naming, any format, matrix by matrix.

Conversion and comparison work on this view, so that neither knows how experts are stacked or which tensor fuses two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leadline.weights.header import CheckpointError
from leadline.weights.names import NAMINGS, Part, is_experts, model_order, to_ours
from leadline.weights.stored import Stored, StoredReader, Value, rows_of


@dataclass(frozen=True)
class Span:
    """Where a tensor of ours lies: a weight of the folder, or the rows begin..end of each matrix in that stack."""

    stored: Stored
    begin: int = 0
    end: int | None = None


class Contents:
    """The tensors of a folder under our names; nothing but headers is read before `read`.

    naming: the one of `names.NAMINGS` that most of the folder's names follow.
    shapes: our name -> shape, experts stacked, in the order of the model.

    Raises what `StoredReader` raises, and CheckpointError for names that the naming lacks, for an expert that is
    missing, and for experts of one stack that differ in shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.reader = StoredReader(folder)
        self.naming = naming_of(self.reader)
        spans: dict[str, dict[int | None, Span]] = {}
        unknown = []
        for stored in self.reader.entries.values():
            parts = to_ours(stored.name, self.naming)
            if not parts:
                unknown.append(stored.name)
            self._check_rank(stored, parts)
            for part, span in zip(parts, _spans(stored, len(parts)), strict=True):
                spans.setdefault(part.ours, {})[part.expert] = span
        if unknown:
            raise CheckpointError(
                f"{self.reader.folder}: tensor {unknown[0]} is none of DeepSeek-V4 under {self.naming} names"
                + (f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else "")
            )
        self._spans = {ours: spans[ours] for ours in sorted(spans, key=model_order)}
        self.shapes = {ours: self._shape(ours, found) for ours, found in self._spans.items()}

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.reader.folder

    def stored(self, ours: str) -> tuple[Stored, ...]:
        """The weights of the folder that hold a tensor of ours: one, or one for each expert."""
        return tuple(span.stored for span in self._spans[ours].values())

    def read(self, part: Part) -> Value:
        """One matrix, or a whole tensor that is no stack, as the folder has it. Mapped, not copied."""
        spans = self._spans[part.ours]
        if part.expert in spans:
            return self.reader.read(spans[part.expert].stored.name)
        span = spans[None]
        value = self.reader.read(span.stored.name)
        if part.expert is None:
            return value
        matrix = value[part.expert]
        return matrix if span.end is None else rows_of(matrix, span.begin, span.end)

    def matrices(self, ours: str) -> list[Part]:
        """The parts of a tensor of ours that `read` gives one at a time."""
        shape = self.shapes[ours]
        return [Part(ours, expert) for expert in range(shape[0])] if len(shape) == 3 else [Part(ours)]

    def _check_rank(self, stored: Stored, parts: tuple[Part, ...]) -> None:
        for part in parts:
            stacked = is_experts(part.ours) and part.expert is None
            rank = len(stored.shape)
            if rank != 3 if stacked else rank > 2 or (is_experts(part.ours) and rank != 2):
                raise CheckpointError(
                    f"{self.reader.file_of(stored.name)}: tensor {stored.name} is {stored}, expected "
                    f"{'a stack of matrices' if stacked else 'a matrix, vector or number'}"
                )
        if len(parts) > 1:
            self.reader.check_fused(stored.name, len(parts))

    def _shape(self, ours: str, spans: dict[int | None, Span]) -> tuple[int, ...]:
        if None in spans:
            span = spans[None]
            shape = span.stored.shape
            return shape if span.end is None else (shape[0], span.end - span.begin, *shape[2:])
        for expert in range(len(spans)):
            if expert not in spans:
                raise CheckpointError(f"{self.folder}: lacks expert {expert} of {ours}, though it has later ones")
        first = spans[0].stored
        for span in spans.values():
            if span.stored.shape != first.shape:
                raise CheckpointError(
                    f"{self.reader.file_of(span.stored.name)}: tensor {span.stored.name} is {span.stored}, "
                    f"{first.name} is {first}: experts of one layer have one shape"
                )
        return (len(spans), *first.shape)


def naming_of(reader: StoredReader) -> str:
    """The naming that most names of a folder follow; the first of equals."""
    hits = {naming: sum(bool(to_ours(name, naming)) for name in reader.entries) for naming in NAMINGS}
    return max(NAMINGS, key=lambda naming: hits[naming])


def _spans(stored: Stored, count: int) -> list[Span]:
    if count < 2:
        return [Span(stored)] * count
    height = stored.shape[1] // count
    return [Span(stored, number * height, (number + 1) * height) for number in range(count)]
