"""From a folder of weights into a model.

Everything is checked before the first byte is copied: every tensor of the model must be in the folder, every tensor of
the folder must belong to the model, and shapes and dtypes must fit. A model is therefore never left half loaded by a
file that does not fit, and no weight keeps its old value in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.transformer import Transformer
from leadline.weights.files import CheckpointReader
from leadline.weights.header import CASTABLE, CheckpointError, TensorInfo, dtype_name
from leadline.weights.names import NAMINGS, FileTensor, file_tensors, is_mtp, keeps_float32

QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8, torch.uint8)


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
    folder unread. Errors: ConfigError, and those of `load_weights`.
    """
    config = ModelConfig.from_file(folder)
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

    Tensors are streamed one by one into their place, experts into their slice of the stack: beside the model itself at
    most one tensor is in memory. A tensor on the meta device is allocated on `device` first.

    dtype: float32, bfloat16 or float16 for all floating tensors except those that the release keeps in float32. None:
    an allocated tensor keeps its dtype, one on the meta device takes that of the file. Values are cast between these
    three dtypes; any other difference is an error, and so is a value too large for float16. ignore_mtp: leave `mtp.*`
    tensors of the folder unread; for a model built without MTP blocks.

    Raises CheckpointError (a ValueError) with the tensor, what was expected and what was found. Until all checks have
    passed the model is unchanged.
    """
    if dtype is not None and dtype not in CASTABLE:
        raise ValueError(f"weights cannot be loaded as {dtype}, only as {', '.join(map(str, CASTABLE))}")
    reader = CheckpointReader(folder)
    _refuse_quantised(reader)
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    expected = _expected_tensors(reader, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _check_names(reader, expected, ignore_mtp)
    dtypes = _choose_dtypes(reader, expected, tensors, dtype)
    places = {name: _Place(model, name, tensor, dtypes[name], device) for name, tensor in tensors.items()}
    for name in reader.tensors:
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


def _refuse_quantised(reader: CheckpointReader) -> None:
    for name, info in reader.tensors.items():
        if info.dtype in QUANTISED:
            raise CheckpointError(
                f"{reader.file_of(name)}: tensor {name} is {info}: loading FP8 and FP4 weights is not supported yet, "
                f"convert the checkpoint to bfloat16 first"
            )


def _expected_tensors(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FileTensor]:
    """What the folder should hold, under the naming that most of its tensors follow."""
    candidates = {naming: file_tensors(shapes, naming) for naming in NAMINGS}
    hits = {naming: len(candidates[naming].keys() & reader.tensors.keys()) for naming in NAMINGS}
    best = max(NAMINGS, key=lambda naming: hits[naming])
    if not hits[best]:
        raise CheckpointError(
            f"{reader.folder}: none of its tensors is one of this model's: it has {_some(reader.tensors)}, "
            f"expected {_some(candidates[best])}"
        )
    return candidates[best]


def _check_names(reader: CheckpointReader, expected: Mapping[str, FileTensor], ignore_mtp: bool) -> None:
    missing = [name for name in expected if name not in reader.tensors]
    if missing:
        hint = "; to do without, build the model with_mtp=False" if all(map(is_mtp, missing)) else ""
        raise CheckpointError(f"{reader.folder}: lacks {_some(missing)}{hint}")
    surplus = [name for name in reader.tensors if name not in expected and not (ignore_mtp and is_mtp(name))]
    if surplus:
        hint = "; to leave them unread, pass ignore_mtp=True" if all(map(is_mtp, surplus)) else ""
        raise CheckpointError(f"{reader.folder}: holds {_some(surplus)}, which the model does not have{hint}")


def _choose_dtypes(
    reader: CheckpointReader,
    expected: Mapping[str, FileTensor],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, torch.dtype]:
    """The dtype that each tensor of the model will have; all shapes and dtypes are checked on the way."""
    chosen: dict[str, torch.dtype] = {}
    for name, wanted in expected.items():
        info = reader.tensors[name]
        for part in wanted.parts:
            target = chosen.setdefault(part.ours, _dtype_of(part.ours, tensors, info, dtype))
            # What takes the file's dtype takes one dtype: experts that differ would be rounded by chance.
            castable = info.dtype in CASTABLE and target in CASTABLE and not _as_found(part.ours, tensors, dtype)
            if info.shape != wanted.shape or not (info.dtype == target or castable):
                raise CheckpointError(
                    f"{reader.file_of(name)}: tensor {name} is {info}, "
                    f"the model's {part.ours} needs {dtype_name(target)} {list(wanted.shape)}"
                )
    return chosen


def _dtype_of(ours: str, tensors: Mapping[str, Tensor], info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
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
def _copy(reader: CheckpointReader, wanted: FileTensor, places: Mapping[str, _Place]) -> None:
    found = reader.read(wanted.name)
    targets = [places[part.ours].slice(part.expert) for part in wanted.parts]
    pieces = found.split([target.shape[1] for target in targets], dim=1) if len(targets) > 1 else [found]
    for target, piece in zip(targets, pieces, strict=True):
        target.copy_(piece)
        if target.dtype == torch.float16 and bool((target.cpu().isinf() & piece.isfinite()).any()):
            raise CheckpointError(
                f"{reader.file_of(wanted.name)}: tensor {wanted.name} has values that float16 cannot hold, "
                f"load it as bfloat16 or float32"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
