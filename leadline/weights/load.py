"""From a folder of weights into a model.

Quantised weights stay what they are, or are dequantised on the way in, matrix by matrix, if the caller names a dtype.

Everything is checked before the first byte is copied: every tensor of the model must be in the folder, every tensor of
the folder must belong to the model, and shapes and dtypes must fit. A model is therefore never left half loaded by a
file that does not fit, and no weight keeps its old value in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.transformer import Transformer
from leadline.weights.header import CASTABLE, CheckpointError
from leadline.weights.names import NAMINGS, FileTensor, file_tensors, is_mtp, keeps_float32
from leadline.weights.place import Place, can_hold, weights_of
from leadline.weights.stored import PLAIN, Quantized, Stored, StoredReader, rows_of
from leadline.weights.target import Form


def load_checkpoint(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    with_mtp: bool = True,
) -> Transformer:
    """Build the model of a folder's `config.json` on `device` and load its weights.

    dtype: of the weights (the few that the release keeps in float32 stay so); None: as the files have them, FP8 and FP4
    too, which makes load(save(model)) bitwise. with_mtp: whether to build and load the MTP blocks, or the draft stages
    of the DSpark refresh; False leaves `mtp.*` of the folder unread. Errors: ConfigError, and those of `load_weights`.
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

    Tensors are streamed one by one into their place, experts into their slice of the stack: beside the model itself
    pieces of one matrix are in memory. A tensor on the meta device is allocated on `device` first.

    dtype: float32, bfloat16 or float16 for all floating tensors except those that the release keeps in float32. None:
    an allocated tensor keeps its dtype, one on the meta device takes that of the file, and its codes and scales where
    they are FP8 or FP4: the model then multiplies them as they are (wo_a in bfloat16). Values are cast between these
    three dtypes, and FP8 and FP4 weights are dequantised into them; any other difference is an error, and so is a value
    too large for float16. ignore_mtp: leave `mtp.*` tensors of the folder unread; for a model built without MTP blocks.

    Raises CheckpointError (a ValueError) with the tensor, what was expected and what was found. Until all checks have
    passed the model is unchanged.
    """
    if dtype is not None and dtype not in CASTABLE:
        raise ValueError(f"weights cannot be loaded as {dtype}, only as {', '.join(map(str, CASTABLE))}")
    reader, own = StoredReader(folder), weights_of(model)
    expected = _expected_tensors(reader, {name: tuple(tensor.shape) for name, tensor in own.items()})
    _check_names(reader, expected, ignore_mtp)
    forms = _choose_forms(reader, expected, own, dtype)
    places = {name: Place(model, name, tensor, forms[name], device) for name, tensor in own.items()}
    for name in reader.entries:
        if name in expected:
            _fill(reader, expected[name], places)
    for place in places.values():
        place.finish()


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


def _choose_forms(
    reader: StoredReader,
    expected: Mapping[str, FileTensor],
    own: Mapping[str, Tensor | Quantized],
    dtype: torch.dtype | None,
) -> dict[str, Form]:
    """The form that each tensor of the model will have; all shapes and dtypes are checked on the way."""
    chosen: dict[str, Form] = {}
    for name, wanted in expected.items():
        info = reader.entries[name]
        for part in wanted.parts:
            form = chosen.setdefault(part.ours, _form(part.ours, own[part.ours], info, dtype))
            if info.shape != wanted.shape or not _takes(form, info, _as_found(part.ours, own[part.ours], dtype)):
                raise CheckpointError(
                    f"{reader.file_of(name)}: tensor {name} is {info}, "
                    f"the model's {part.ours} needs {form} {list(wanted.shape)}"
                )
        if len(wanted.parts) > 1:
            reader.check_fused(name, len(wanted.parts))
    for name, form in chosen.items():
        if name.endswith("ffn.experts.w1") and (up := chosen[name[:-1] + "3"]).kind != form.kind:
            raise CheckpointError(f"{reader.folder}: {name} is {form}, its w3 {up}: both must have one format")
    return chosen


def _takes(form: Form, info: Stored, as_found: bool) -> bool:
    """Whether a tensor of the model that has, or gets, a form can be filled from a weight."""
    if form.kind != PLAIN:
        return (info.format, info.scale_dtype) == (form.kind, form.dtype)
    if info.format != PLAIN:
        return form.dtype in CASTABLE
    # What takes the file's dtype takes one dtype: experts that differ would be rounded by chance.
    return info.dtype == form.dtype or (info.dtype in CASTABLE and form.dtype in CASTABLE and not as_found)


def _form(ours: str, own: Tensor | Quantized, info: Stored, dtype: torch.dtype | None) -> Form:
    if isinstance(own, Quantized):
        return Form(own.format, own.scale.dtype)
    if _as_found(ours, own, dtype):
        if info.scale_dtype is None:
            return Form(PLAIN, info.dtype)
        return Form(info.format, info.scale_dtype) if can_hold(ours) else Form(PLAIN, torch.bfloat16)
    if not own.is_floating_point() or (dtype is None and not own.is_meta):
        return Form(PLAIN, own.dtype)
    return Form(PLAIN, torch.float32 if dtype is None or keeps_float32(ours) else dtype)


def _as_found(ours: str, own: Tensor | Quantized, dtype: torch.dtype | None) -> bool:
    """Whether the file decides the form of this tensor."""
    if isinstance(own, Quantized):
        return False
    return dtype is None and own.is_meta and own.is_floating_point() and not keeps_float32(ours)


@torch.no_grad()
def _fill(reader: StoredReader, wanted: FileTensor, places: Mapping[str, Place]) -> None:
    found = reader.read(wanted.name)
    try:
        if len(found.shape) < 3:
            places[wanted.parts[0].ours].fill(wanted.parts[0].expert, found)
            return
        for expert in range(found.shape[0]):
            matrix, height = found[expert], found.shape[1] // len(wanted.parts)
            for number, part in enumerate(wanted.parts):
                places[part.ours].fill(expert, rows_of(matrix, number * height, (number + 1) * height))
    except CheckpointError as error:
        raise CheckpointError(f"{reader.file_of(wanted.name)}: tensor {wanted.name} {error}") from None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
