"""A folder to be written: which tensors it will hold, and how each of them gets there.

Three formats of a whole checkpoint, each with norms, embedding and the like in bfloat16 and a few tensors in float32:

    bf16   nothing quantised
    fp8    linear maps and experts in FP8: the released Base models
    fp4    linear maps in FP8, experts in FP4: the released Flash and Pro

Everything is planned from names and shapes before the first byte is written. Then the weights flow through, a piece of
a matrix at a time, from wherever they come: a model (`save.py`) or another folder (`convert.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from leadline.formats import fp4, fp8
from leadline.model.config import ModelConfig
from leadline.weights.files import MAX_SHARD_BYTES, ShardWriter, TensorSpec, plan_shards, write_index
from leadline.weights.header import CheckpointError, dtype_name, num_bytes
from leadline.weights.names import (
    FileTensor,
    Part,
    file_tensors,
    is_experts,
    is_linear,
    keeps_float32,
    model_order,
    scale_name,
)
from leadline.weights.stored import FP4, FP8, PLAIN, Value, encode, pieces, quantized_specs

BF16 = "bf16"
FORMATS = (BF16, FP8, FP4)
# As released: the Base models have F32 scales, Flash and Pro E8M0.
SCALES = {FP8: torch.float32, FP4: torch.float8_e8m0fnu}
CONFIG_SPELLING = {
    "official": "official",
    "transformers": "transformers",
    "transformers_saved": "transformers",
}

Advance = Callable[[int], None]  # told how many more bytes have been written


@dataclass(frozen=True)
class Form:
    """How one weight is held. kind: PLAIN, FP8 or FP4; dtype: of the plain tensor, or of the scales."""

    kind: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return dtype_name(self.dtype) if self.kind == PLAIN else self.kind.upper()


@dataclass(frozen=True)
class Output:
    """One weight to be written: the file tensor with its values' shape, and what the file holds for it."""

    tensor: FileTensor
    form: Form
    specs: tuple[TensorSpec, ...]

    def parts(self) -> Iterator[Part]:
        """What lies in it, matrix by matrix, in row-major order."""
        if len(self.tensor.shape) < 3:
            yield from self.tensor.parts
            return
        for expert in range(self.tensor.shape[0]):
            for part in self.tensor.parts:
                yield Part(part.ours, expert)


def form_of(ours: str, dtype: torch.dtype, target: str, scales: torch.dtype) -> Form:
    """The form of a tensor of ours, whose values have a dtype, in one of FORMATS with scales of a dtype."""
    if target not in FORMATS:
        raise ValueError(f"format {target!r} is not one of {', '.join(FORMATS)}")
    if target != BF16 and (is_linear(ours) or is_experts(ours)):
        return Form(target if is_experts(ours) else FP8, scales)
    if not dtype.is_floating_point:
        return Form(PLAIN, dtype)
    return Form(PLAIN, torch.float32 if keeps_float32(ours) else torch.bfloat16)


def plan(shapes: Mapping[str, tuple[int, ...]], forms: Mapping[str, Form], naming: str) -> list[Output]:
    """All weights of a folder, given shape and form of each tensor of ours, in the order of the model.

    CheckpointError where a form does not fit a shape: FP4 needs rows of whole blocks of 32, and two experts' matrices
    that the naming fuses need heights of whole blocks of 128 under FP8.
    """
    ordered = {ours: shapes[ours] for ours in sorted(shapes, key=model_order)}
    return [_output(tensor, forms, naming) for tensor in file_tensors(ordered, naming).values()]


def config_of(config: ModelConfig, target: str) -> ModelConfig:
    """The configuration with the fields that announce a format, spelled as in the released files."""
    if target == BF16:
        return config.replace(torch_dtype="bfloat16", expert_dtype=None, quantization_config=None)
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [fp8.WEIGHT_BLOCK, fp8.WEIGHT_BLOCK],
    }
    return config.replace(torch_dtype="bfloat16", expert_dtype=target, quantization_config=quantization)


def write_weights(
    folder: Path,
    outputs: Iterable[Output],
    read: Callable[[Part], Value],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = lambda written: None,
) -> None:
    """Write all weights into `folder`, shard by shard, and the index.

    A shard takes its name when it is complete and on disk. One that has its name already is left as it is: so the
    writing goes on where it stopped, if the folder comes from a run with the same outputs. read: gives a matrix, or a
    tensor that is no stack; it is asked once for each, and held until it is written.
    """
    by_name = {output.tensor.name: output for output in outputs}
    shards = plan_shards((output.specs for output in by_name.values()), max_shard_bytes)
    for file_name, specs in shards.items():
        path = folder / file_name
        if path.exists():
            advance(sum(num_bytes(dtype, shape) for _, dtype, shape in specs))
            continue
        unfinished = folder / f".{file_name}.part"
        with ShardWriter(unfinished, specs) as shard:
            for name, _, _ in specs:
                if name in by_name:
                    _write(by_name[name], read, shard, advance)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    write_index(folder, shards)


def _output(tensor: FileTensor, forms: Mapping[str, Form], naming: str) -> Output:
    form = forms[tensor.parts[0].ours]
    for part in tensor.parts[1:]:
        if forms[part.ours] != form:
            raise CheckpointError(
                f"tensor {tensor.name} fuses {tensor.parts[0].ours} and {part.ours}, which have two formats: "
                f"convert to one format, or keep the official names"
            )
    if form.kind == PLAIN:
        return Output(tensor, form, ((tensor.name, form.dtype, tensor.shape),))
    if form.kind == FP4 and tensor.shape[-1] % fp4.BLOCK:
        raise CheckpointError(
            f"tensor {tensor.name} {list(tensor.shape)}: FP4 needs rows of whole blocks of {fp4.BLOCK}"
        )
    height = tensor.shape[-2] // len(tensor.parts)
    if form.kind == FP8 and len(tensor.parts) > 1 and height % fp8.WEIGHT_BLOCK:
        raise CheckpointError(
            f"tensor {tensor.name} fuses two matrices of {height} rows, FP8 needs whole blocks of {fp8.WEIGHT_BLOCK}: "
            f"keep the official names, which store them apart"
        )
    scale = scale_name(tensor.name, naming)
    return Output(tensor, form, quantized_specs(tensor.name, scale, form.kind, tensor.shape, form.dtype))


def _write(output: Output, read: Callable[[Part], Value], shard: ShardWriter, advance: Advance) -> None:
    for part in output.parts():
        row = 0
        for piece in pieces(read(part)):
            where = f"{output.tensor.name} from row {row}" if row else output.tensor.name
            row += piece.shape[0] if piece.shape else 0
            stored = encode(piece, output.form.kind, output.form.dtype, where)
            for (name, _, _), content in zip(output.specs, stored, strict=True):
                shard.append(name, content)
                advance(content.nbytes)
