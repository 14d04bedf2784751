"""Tensors as files hold them: plain, or as codes with a tensor of scales beside them.

The released files hold most matrices in eight bits and, after post-training, the routed experts in four (report 5.2.1):

    fp8   codes F8_E4M3 [O, N]; one scale for each block of 128 x 128 codes, [ceil(O / 128), ceil(N / 128)]
    fp4   codes I8 [O, N / 2], two E2M1 values a byte, the even column in the low half; one scale for 32 columns of a
          row, [O, N / 32]

A value is its code times the scale of its block. Scales are E8M0 (Flash, Pro) or F32 (the Base models). A stack of
matrices has one more axis in front of both.

`StoredReader` shows a folder as weights only: each quantised one is found together with its scales, and dtypes and
block grids are checked from the headers, before any data is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8
from leadline.weights.files import CheckpointReader, TensorSpec
from leadline.weights.header import CheckpointError, TensorInfo, dtype_name
from leadline.weights.names import scale_name

PLAIN, FP8, FP4 = "plain", "fp8", "fp4"
CODES = {torch.float8_e4m3fn: FP8, torch.int8: FP4, torch.uint8: FP4}
CODE_DTYPE = {FP8: torch.float8_e4m3fn, FP4: torch.int8}
E8M0 = torch.float8_e8m0fnu
SCALE_DTYPES = (torch.float32, E8M0)

# Pieces of a large matrix have at most about this many values: 4 MB in float32, which stays in a processor's cache.
# Whole matrices take two to seven times as long.
VALUES_PER_PIECE = 1 << 20


@dataclass(frozen=True)
class Quantized:
    """Codes and scales of a matrix or of a stack of them, in one of the formats FP8 and FP4."""

    format: str
    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        *front, columns = self.codes.shape
        return (*front, 2 * columns if self.format == FP4 else columns)

    def __getitem__(self, number: int) -> Quantized:
        """One matrix of a stack."""
        return Quantized(self.format, self.codes[number], self.scale[number])

    def rows(self, begin: int, end: int) -> Quantized:
        """Some rows of a matrix, from the first row of a block on."""
        block = fp8.WEIGHT_BLOCK if self.format == FP8 else 1
        assert begin % block == 0, f"row {begin} is inside of a block"
        return Quantized(self.format, self.codes[begin:end], self.scale[begin // block : -(-end // block)])

    def float(self) -> Tensor:
        """The values, in float32."""
        if self.format == FP8:
            return fp8.dequantize_weight(self.codes, self.scale)
        return fp4.dequantize(self.codes, self.scale)


Value = Tensor | Quantized


@dataclass(frozen=True)
class Stored:
    """One weight of a folder, seen from the headers.

    shape: of its values. dtype: of the plain tensor or of the codes. scale: the tensor of its scales, with their dtype;
    None and None for a plain one. num_bytes: of codes and scales together.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: str | None
    scale_dtype: torch.dtype | None
    num_bytes: int

    def __str__(self) -> str:
        if self.format == PLAIN:
            return f"{dtype_name(self.dtype)} {list(self.shape)}"
        return f"{self.format.upper()} {list(self.shape)}"


class StoredReader:
    """The weights of a folder, each with its scales.

    entries: name -> Stored of every weight, shard by shard in the order of their bytes.

    Opening raises what `CheckpointReader` raises, and CheckpointError, naming file and tensor, for codes without scales
    and for scales of an unknown dtype or of another block grid than their codes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.files = CheckpointReader(folder)
        tensors = self.files.tensors
        scales = {name: self._scale_of(name) for name, info in tensors.items() if info.dtype in CODES}
        taken = set(scales.values())
        self.entries = {
            name: self._entry(name, info, scales.get(name)) for name, info in tensors.items() if name not in taken
        }
        self._checked: set[str] = set()

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.files.folder

    def file_of(self, name: str) -> Path:
        """The file that holds a weight."""
        return self.files.file_of(name)

    def read(self, name: str) -> Value:
        """One weight as the file has it, mapped, not copied. CheckpointError if one of its scales is NaN, infinite or
        negative."""
        entry = self.entries[name]
        if entry.scale is None:
            return self.files.read(name)
        scale = self.files.read(entry.scale)
        if name not in self._checked:
            self._check_scales(entry.scale, scale)
            self._checked.add(name)
        return Quantized(entry.format, self.files.read(name), scale)

    def check_fused(self, name: str, count: int) -> None:
        """CheckpointError unless each matrix of a stack can be cut into `count` equal runs of rows, scales included."""
        entry = self.entries[name]
        height, rest = divmod(entry.shape[1], count)
        if rest or (entry.format == FP8 and height % fp8.WEIGHT_BLOCK):
            raise CheckpointError(
                f"{self.file_of(name)}: tensor {name} is {entry}, not to be cut into {count} matrices of equal height"
                + (f" and whole blocks of {fp8.WEIGHT_BLOCK} rows" if entry.format == FP8 else "")
            )

    def _scale_of(self, name: str) -> str:
        candidates = [scale_name(name, naming) for naming in ("official", "transformers")]
        for candidate in candidates:
            if candidate in self.files.tensors:
                return candidate
        raise CheckpointError(
            f"{self.file_of(name)}: tensor {name} is {self.files.tensors[name]}, but the folder lacks its scales, "
            f"{candidates[0]}"
        )

    def _entry(self, name: str, info: TensorInfo, scale: str | None) -> Stored:
        if scale is None:
            return Stored(name, PLAIN, info.shape, info.dtype, None, None, info.end - info.begin)
        form, scales = CODES[info.dtype], self.files.tensors[scale]
        shape = (*info.shape[:-1], 2 * info.shape[-1]) if form == FP4 and info.shape else info.shape
        if len(shape) < 2 or (form == FP4 and shape[-1] % fp4.BLOCK):
            raise CheckpointError(f"{self.file_of(name)}: tensor {name} is {info}, which is no matrix of whole blocks")
        if scales.dtype not in SCALE_DTYPES:
            raise CheckpointError(f"{self.file_of(scale)}: tensor {scale} is {scales}, scales are F32 or F8_E8M0")
        if scales.shape != scale_shape(form, shape):
            raise CheckpointError(
                f"{self.file_of(scale)}: tensor {scale} is {scales}, {name} {info} needs "
                f"{list(scale_shape(form, shape))}, one for each {'128 x 128 codes' if form == FP8 else '32 values'}"
            )
        size = info.end - info.begin + scales.end - scales.begin
        return Stored(name, form, shape, info.dtype, scale, scales.dtype, size)

    def _check_scales(self, name: str, scale: Tensor) -> None:
        values = e8m0.to_float32(scale)
        wrong = ~(values.isfinite() & (values >= 0))
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise CheckpointError(
                f"{self.file_of(name)}: tensor {name} holds the scale {float(values[tuple(place)])} at {place}: "
                f"the file is damaged, fetch it again"
            )


def scale_shape(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix or stack in FP8 or FP4, given the shape of its values."""
    *front, rows, columns = shape
    if form == FP8:
        return (*front, -(-rows // fp8.WEIGHT_BLOCK), -(-columns // fp8.WEIGHT_BLOCK))
    return (*front, rows, columns // fp4.BLOCK)


def quantized_specs(
    name: str, scale: str, form: str, shape: tuple[int, ...], scale_dtype: torch.dtype
) -> tuple[TensorSpec, TensorSpec]:
    """What a file holds for a weight with values of this shape: its codes and its scales."""
    *front, columns = shape
    codes = (*front, columns // 2 if form == FP4 else columns)
    return (name, CODE_DTYPE[form], codes), (scale, scale_dtype, scale_shape(form, shape))


def pieces(value: Value) -> Iterator[Value]:
    """A matrix, vector or scalar cut into runs of rows, each small enough to be converted in memory."""
    if len(value.shape) < 2:
        yield value
        return
    rows, columns = value.shape
    step = max(1, VALUES_PER_PIECE // max(columns, 1) // fp8.WEIGHT_BLOCK) * fp8.WEIGHT_BLOCK
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield rows_of(value, begin, end)


def rows_of(value: Value, begin: int, end: int) -> Value:
    """Some rows of a matrix. AssertionError where they begin inside of a block of FP8."""
    return value.rows(begin, end) if isinstance(value, Quantized) else value[begin:end]


def as_float(value: Value) -> Tensor:
    """The values in float32, or as they are where they are no floating numbers."""
    if isinstance(value, Quantized):
        return value.float()
    return value.float() if value.is_floating_point() else value


def encode(value: Value, form: str, dtype: torch.dtype, name: str) -> tuple[Tensor, ...]:
    """A piece in another form: (plain tensor of `dtype`,) or (codes, scales of `dtype`).

    From four bits to eight the values stay exactly the same. CheckpointError names `name` where they cannot, and where
    there are values that are not finite and would have to be quantised. Codes of the form that is asked for are kept as
    they are, and their scales too where `dtype` can hold them.
    """
    if form == PLAIN:
        if isinstance(value, Quantized):
            return (value.float().to(dtype),)
        return (value.to(dtype) if value.is_floating_point() else value,)
    if isinstance(value, Quantized) and value.format == form and _fits(value.scale, dtype):
        return value.codes.view(CODE_DTYPE[form]), _scale_as(value.scale, dtype)
    if isinstance(value, Quantized) and (value.format, form) == (FP4, FP8):
        try:
            codes, scale = fp4.to_fp8(value.codes, value.scale, name)
        except ValueError as error:
            raise CheckpointError(f"tensor {error}") from None
        return codes, _scale_as(scale, dtype)
    codes, scale = (fp8.quantize_weight if form == FP8 else fp4.quantize)(as_float(value))
    if not bool(scale.isfinite().all()):
        raise CheckpointError(f"tensor {name}: holds infinity or NaN, which no {form.upper()} block can hold")
    return codes.view(CODE_DTYPE[form]), _scale_as(scale, dtype)


def _fits(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales keep their value in a dtype: any do in float32, powers of two in E8M0."""
    if dtype == torch.float32 or scale.dtype == dtype:
        return True
    return bool((e8m0.encode(scale) != e8m0.NAN_CODE).all())


def _scale_as(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if scale.dtype == dtype:
        return scale
    if dtype == torch.float32:
        return e8m0.to_float32(scale)
    return e8m0.encode(scale).view(E8M0)
