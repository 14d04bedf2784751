"""What a folder holds, under our names: any naming, any format, matrix by matrix.

Conversion and comparison work on this view, so that neither knows how experts are stacked or which tensor fuses two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leadline.weights.header import CheckpointError
from leadline.weights.names import NAMINGS, Part, is_experts, is_mtp, model_order, to_ours
from leadline.weights.stored import Stored, StoredReader, Value, rows_of


@dataclass(frozen=True)
class Place:
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
        places: dict[str, dict[int | None, Place]] = {}
        unknown = []
        for stored in self.reader.entries.values():
            parts = to_ours(stored.name, self.naming)
            if not parts:
                unknown.append(stored.name)
            self._check_rank(stored, parts)
            for part, place in zip(parts, _places(stored, len(parts)), strict=True):
                places.setdefault(part.ours, {})[part.expert] = place
        if unknown:
            raise CheckpointError(
                f"{self.reader.folder}: tensor {unknown[0]} is none of DeepSeek-V4 under {self.naming} names"
                + (f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else "")
            )
        self._places = {ours: places[ours] for ours in sorted(places, key=model_order)}
        self.shapes = {ours: self._shape(ours, found) for ours, found in self._places.items()}

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.reader.folder

    def stored(self, ours: str) -> tuple[Stored, ...]:
        """The weights of the folder that hold a tensor of ours: one, or one for each expert."""
        return tuple(place.stored for place in self._places[ours].values())

    def read(self, part: Part) -> Value:
        """One matrix, or a whole tensor that is no stack, as the folder has it. Mapped, not copied."""
        places = self._places[part.ours]
        if part.expert in places:
            return self.reader.read(places[part.expert].stored.name)
        place = places[None]
        value = self.reader.read(place.stored.name)
        if part.expert is None:
            return value
        matrix = value[part.expert]
        return matrix if place.end is None else rows_of(matrix, place.begin, place.end)

    def matrices(self, ours: str) -> list[Part]:
        """The parts of a tensor of ours that `read` gives one at a time."""
        shape = self.shapes[ours]
        return [Part(ours, expert) for expert in range(shape[0])] if len(shape) == 3 else [Part(ours)]

    def has_mtp(self) -> bool:
        """Whether the folder holds an MTP block or draft stages."""
        return any(map(is_mtp, self.shapes))

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

    def _shape(self, ours: str, places: dict[int | None, Place]) -> tuple[int, ...]:
        if None in places:
            place = places[None]
            shape = place.stored.shape
            return shape if place.end is None else (shape[0], place.end - place.begin, *shape[2:])
        for expert in range(len(places)):
            if expert not in places:
                raise CheckpointError(f"{self.folder}: lacks expert {expert} of {ours}, though it has later ones")
        first = places[0].stored
        for place in places.values():
            if place.stored.shape != first.shape:
                raise CheckpointError(
                    f"{self.reader.file_of(place.stored.name)}: tensor {place.stored.name} is {place.stored}, "
                    f"{first.name} is {first}: experts of one layer have one shape"
                )
        return (len(places), *first.shape)


def naming_of(reader: StoredReader) -> str:
    """The naming that most names of a folder follow; the first of equals."""
    hits = {naming: sum(bool(to_ours(name, naming)) for name in reader.entries) for naming in NAMINGS}
    return max(NAMINGS, key=lambda naming: hits[naming])


def _places(stored: Stored, count: int) -> list[Place]:
    if count < 2:
        return [Place(stored)] * count
    height = stored.shape[1] // count
    return [Place(stored, number * height, (number + 1) * height) for number in range(count)]
