"""A weight in eight or four bits: codes, their scales, and what both mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8

Format = Literal["fp8", "fp4"]
FORMATS: tuple[Format, ...] = ("fp8", "fp4")
SLAB = fp8.ACTIVATION_BLOCK  # columns that one scale of the activations covers, and one scale of an FP8 weight

_VALUES_AT_ONCE = 1 << 26  # of a stack; 268 MB in float32
_SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [O, N] or a stack of them [E, O, N].

    FP8: codes float8_e4m3fn [..., O, N], scale for blocks of 128 x 128, [..., ceil(O / 128), ceil(N / 128)].
    FP4: codes uint8 or int8 [..., O, N / 2], two E2M1 values a byte; scale for 32 columns of a row, [..., O, N / 32];
    and block_scale, E8M0 bytes in the grid of FP8: the scale under which a block is exact in E4M3 (`fp4.fp8_scale`),
    which is how it is multiplied.

    scale: float32 or E8M0 (float8_e8m0fnu, or its bytes as uint8). Build one with `of` or `quantize`.
    """

    codes: Tensor
    scale: Tensor
    block_scale: Tensor | None = None

    def __post_init__(self) -> None:
        kinds = (torch.float8_e4m3fn,) if self.block_scale is None else (torch.uint8, torch.int8)
        if self.codes.dtype not in kinds or self.scale.dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"a quantised weight needs codes in {' or '.join(map(str, kinds))} and scales in float32 or E8M0, got "
                f"{self.codes.dtype} and {self.scale.dtype}: do not cast a quantised model"
            )

    @staticmethod
    def of(codes: Tensor, scale: Tensor, name: str = "weight") -> QuantizedWeight:
        """The weight that codes and scales of a file stand for. ValueError, with `name`, when they do not fit, and when
        an FP4 weight is not exact in FP8; that check waits for the device."""
        if codes.dtype == torch.float8_e4m3fn:
            *stack, rows, columns = codes.shape
            grid = (*stack, -(-rows // fp8.WEIGHT_BLOCK), -(-columns // fp8.WEIGHT_BLOCK))
            if tuple(scale.shape) != grid:
                raise ValueError(f"{name}: codes {list(codes.shape)} need scales {list(grid)}, got {list(scale.shape)}")
            return QuantizedWeight(codes, scale)
        if codes.dtype in (torch.uint8, torch.int8):
            return QuantizedWeight(codes, scale, e8m0.encode(fp4.fp8_scale(codes, scale, name)))
        raise ValueError(f"{name}: {codes.dtype} is no quantised format; expected float8_e4m3fn or pairs as uint8")

    @property
    def format(self) -> Format:
        return "fp8" if self.block_scale is None else "fp4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        *front, columns = self.codes.shape
        return (*front, columns if self.block_scale is None else 2 * columns)

    def __getitem__(self, number: int) -> QuantizedWeight:
        """One matrix of a stack."""
        block_scale = None if self.block_scale is None else self.block_scale[number]
        return QuantizedWeight(self.codes[number], self.scale[number], block_scale)

    def values(self) -> Tensor:
        """The numbers that it stands for, float32 [..., O, N]."""
        if self.block_scale is None:
            return fp8.dequantize_weight(self.codes, self.scale)
        return fp4.dequantize(self.codes, self.scale)

    def slab(self, number: int) -> tuple[Tensor, Tensor]:
        """Columns 128 `number` to 128 `number` + 127 as E4M3 values, float32 [..., O, 128], and the scale of each row,
        float32 [..., O]. The last slab may be narrower."""
        columns = slice(number * SLAB, (number + 1) * SLAB)
        rows = self.codes.shape[-2]
        if self.block_scale is None:
            codes, scale = self.codes[..., columns].float(), e8m0.to_float32(self.scale[..., number])
            return codes, _spread(scale, rows)
        pairs = slice(columns.start // 2, columns.stop // 2)
        groups = slice(columns.start // fp4.BLOCK, columns.stop // fp4.BLOCK)
        scale = _spread(e8m0.decode(self.block_scale[..., number]), rows)
        relative = e8m0.to_float32(self.scale[..., groups]) / scale[..., None]
        return fp4.dequantize(self.codes[..., pairs], relative), scale


def quantize(
    weight: Tensor, format: Format, name: str = "weight", scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> QuantizedWeight:
    """Round a floating weight, [O, N] or a stack [E, O, N], to a format.

    FP8: blocks of 128 x 128. FP4: 32 columns of a row; N must be a multiple of 32. scale_dtype: float8_e8m0fnu, as in
    the released models, or float32, as in the base models; the scales are powers of two in both. ValueError, with
    `name`, when the FP4 result would not be exact in FP8. A stack is rounded a few matrices at a time.
    """
    if weight.ndim == 2:
        return _quantize(weight, format, name, scale_dtype)
    pieces = weight.split(max(1, _VALUES_AT_ONCE // weight[0].numel()))
    parts = [_quantize(piece, format, name, scale_dtype) for piece in pieces]
    block_scales = [part.block_scale for part in parts if part.block_scale is not None]
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(block_scales) if block_scales else None,
    )


def _quantize(weight: Tensor, format: Format, name: str, scale_dtype: torch.dtype) -> QuantizedWeight:
    codes, scale = fp8.quantize_weight(weight) if format == "fp8" else fp4.quantize(weight)
    if scale_dtype != torch.float32:
        scale = e8m0.encode(scale).view(scale_dtype)
    return QuantizedWeight.of(codes, scale, name)


def _spread(scale: Tensor, rows: int) -> Tensor:
    """A scale for every row from one for every 128."""
    return scale.repeat_interleave(fp8.WEIGHT_BLOCK, -1)[..., :rows]
