"""From a folder of weights into a model.

Quantised weights are dequantised on the way in, matrix by matrix, when the caller names a dtype.

Everything is checked before the first byte is copied: every tensor of the model must be in the folder, every tensor of
the folder must belong to the model, and shapes and dtypes must fit. A model is therefore never left half loaded by a
file that does not fit, and no weight keeps its old value in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.transformer import Transformer
from leadline.weights.header import CASTABLE, CheckpointError, dtype_name
from leadline.weights.names import NAMINGS, FileTensor, file_tensors, is_mtp, keeps_float32
from leadline.weights.stored import PLAIN, Stored, StoredReader, Value, pieces, rows_of


def load_checkpoint(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    with_mtp: bool = True,
) -> Transformer:
    """Build the model of a folder's `config.json` on `device` and load its weights.

    dtype: of the weights (the few that the release keeps in float32 stay so); None: as the files have them, which
    makes load(save(model)) bitwise. with_mtp: whether to build and load the MTP blocks; False leaves `mtp.*` of the
    folder unread. They are unread too where they are the draft stages of the DSpark refresh, which the model has not.
    Errors: ConfigError, and those of `load_weights`.
    """
    config = ModelConfig.from_file(folder)
    with_mtp = with_mtp and not config.has_draft_stages
    with torch.device("meta"):
        model = Transformer(config, with_mtp=with_mtp)
    load_weights(model, folder, dtype=dtype, device=device, ignore_mtp=not with_mtp)
    return model


def load_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore_mtp: bool = False,
) -> None:
    """Fill all parameters and persistent buffers of `model` from a folder, under whichever naming it uses.

    Tensors are streamed one by one into their place, experts into their slice of the stack: beside the model itself
    pieces of one matrix are in memory. A tensor on the meta device is allocated on `device` first.

    dtype: float32, bfloat16 or float16 for all floating tensors except those that the release keeps in float32. None:
    an allocated tensor keeps its dtype, one on the meta device takes that of the file. Values are cast between these
    three dtypes, and FP8 and FP4 weights are dequantised into them; any other difference is an error, and so is a value
    too large for float16. ignore_mtp: leave `mtp.*`
    tensors of the folder unread; for a model built without MTP blocks.

    Raises CheckpointError (a ValueError) with the tensor, what was expected and what was found. Until all checks have
    passed the model is unchanged.
    """
    if dtype is not None and dtype not in CASTABLE:
        raise ValueError(f"weights cannot be loaded as {dtype}, only as {', '.join(map(str, CASTABLE))}")
    reader = StoredReader(folder)
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    expected = _expected_tensors(reader, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _check_names(reader, expected, ignore_mtp)
    dtypes = _choose_dtypes(reader, expected, tensors, dtype)
    places = {name: _Place(model, name, tensor, dtypes[name], device) for name, tensor in tensors.items()}
    for name in reader.entries:
        if name in expected:
            _copy(reader, expected[name], places)


@dataclass
class _Place:
    """Where a tensor of the model goes; allocated when its first bytes arrive."""

    model: nn.Module
    name: str
    tensor: Tensor
    dtype: torch.dtype
    device: torch.device | str

    def slice(self, expert: int | None) -> Tensor:
        if self.tensor.is_meta or self.tensor.dtype != self.dtype:
            self._allocate()
        whole = self.tensor.detach()
        return whole if expert is None else whole[expert]

    def _allocate(self) -> None:
        device = self.device if self.tensor.is_meta else self.tensor.device
        fresh = torch.empty(self.tensor.shape, dtype=self.dtype, device=device)
        owner, _, leaf = self.name.rpartition(".")
        if isinstance(self.tensor, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=self.tensor.requires_grad)
        setattr(self.model.get_submodule(owner), leaf, fresh)
        self.tensor = fresh


def _expected_tensors(reader: StoredReader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FileTensor]:
    """What the folder should hold, under the naming that most of its tensors follow."""
    candidates = {naming: file_tensors(shapes, naming) for naming in NAMINGS}
    hits = {naming: len(candidates[naming].keys() & reader.entries.keys()) for naming in NAMINGS}
    best = max(NAMINGS, key=lambda naming: hits[naming])
    if not hits[best]:
        raise CheckpointError(
            f"{reader.folder}: none of its tensors is one of this model's: it has {_some(reader.entries)}, "
            f"expected {_some(candidates[best])}"
        )
    return candidates[best]


def _check_names(reader: StoredReader, expected: Mapping[str, FileTensor], ignore_mtp: bool) -> None:
    missing = [name for name in expected if name not in reader.entries]
    if missing:
        hint = "; to do without, build the model with_mtp=False" if all(map(is_mtp, missing)) else ""
        raise CheckpointError(f"{reader.folder}: lacks {_some(missing)}{hint}")
    surplus = [name for name in reader.entries if name not in expected and not (ignore_mtp and is_mtp(name))]
    if surplus:
        hint = "; to leave them unread, pass ignore_mtp=True" if all(map(is_mtp, surplus)) else ""
        raise CheckpointError(f"{reader.folder}: holds {_some(surplus)}, which the model does not have{hint}")


def _choose_dtypes(
    reader: StoredReader,
    expected: Mapping[str, FileTensor],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, torch.dtype]:
    """The dtype that each tensor of the model will have; all shapes and dtypes are checked on the way."""
    chosen: dict[str, torch.dtype] = {}
    for name, wanted in expected.items():
        info = reader.entries[name]
        for part in wanted.parts:
            target = chosen.setdefault(part.ours, _dtype_of(part.ours, tensors, info, dtype))
            if info.shape != wanted.shape or not _takes(target, info, _as_found(part.ours, tensors, dtype)):
                raise CheckpointError(
                    f"{reader.file_of(name)}: tensor {name} is {info}, "
                    f"the model's {part.ours} needs {dtype_name(target)} {list(wanted.shape)}"
                    + (": name a dtype to dequantise it to" if info.format != PLAIN and dtype is None else "")
                )
        if len(wanted.parts) > 1:
            reader.check_fused(name, len(wanted.parts))
    return chosen


def _takes(target: torch.dtype, info: Stored, as_found: bool) -> bool:
    """Whether a tensor of the model that has, or gets, a dtype can be filled from a weight."""
    if info.format != PLAIN:
        return target in CASTABLE
    # What takes the file's dtype takes one dtype: experts that differ would be rounded by chance.
    return info.dtype == target or (info.dtype in CASTABLE and target in CASTABLE and not as_found)


def _dtype_of(ours: str, tensors: Mapping[str, Tensor], info: Stored, dtype: torch.dtype | None) -> torch.dtype:
    own = tensors[ours]
    if _as_found(ours, tensors, dtype):
        return info.dtype
    if not own.is_floating_point() or (dtype is None and not own.is_meta):
        return own.dtype
    return torch.float32 if dtype is None or keeps_float32(ours) else dtype


def _as_found(ours: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> bool:
    """Whether the file decides the dtype of this tensor."""
    own = tensors[ours]
    return dtype is None and own.is_meta and own.is_floating_point() and not keeps_float32(ours)


@torch.no_grad()
def _copy(reader: StoredReader, wanted: FileTensor, places: Mapping[str, _Place]) -> None:
    found = reader.read(wanted.name)
    targets = [places[part.ours].slice(part.expert) for part in wanted.parts]
    for target, matrix in _matrices(found, targets):
        begin = 0
        for piece in pieces(matrix):
            values = piece if isinstance(piece, Tensor) else piece.float()
            rows = target if values.ndim < 2 else target[begin : begin + len(values)]
            rows.copy_(values)
            if target.dtype == torch.float16 and bool((rows.cpu().isinf() & values.isfinite()).any()):
                raise CheckpointError(
                    f"{reader.file_of(wanted.name)}: tensor {wanted.name} has values that float16 cannot hold, "
                    f"load it as bfloat16 or float32"
                )
            begin += len(values) if values.ndim else 0


def _matrices(found: Value, targets: list[Tensor]) -> Iterator[tuple[Tensor, Value]]:
    """The matrices of a weight, each with the place it goes to; what is no stack goes whole."""
    if len(found.shape) < 3:
        yield targets[0], found
        return
    for expert in range(found.shape[0]):
        matrix, begin = found[expert], 0
        for target in targets:
            height = target.shape[1]
            yield target[expert], rows_of(matrix, begin, begin + height)
            begin += height


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
