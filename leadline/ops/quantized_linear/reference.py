"""Quantised products in plain PyTorch.

The sum over a slab of 128 columns is exact, whatever its order: products of two E4M3 values are multiples of 2^-18
below 2^18, so 128 of them fit into the 53 bits of float64 with room to spare. It is rounded to FP32 once. The slabs are
then scaled and added in FP32, in ascending order. No result therefore depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from leadline.formats import fp8
from leadline.ops.quantized_linear.weight import SLAB, QuantizedWeight


def products(x_TN: Tensor, weights: Sequence[QuantizedWeight], counts_E: Tensor | None) -> tuple[Tensor, ...]:
    """x W^T for each weight, [T, O] in the dtype of x; with counts, for stacks of weights and rows sorted by expert."""
    codes_TN, scale_TB = fp8.quantize(x_TN, SLAB)
    results = []
    for weight in weights:
        if counts_E is None:
            y_TO = _product(codes_TN, scale_TB, weight)
        else:
            y_TO = x_TN.new_empty(len(x_TN), weight.shape[-2], dtype=torch.float32)
            for expert, rows in _runs(counts_E):
                y_TO[rows] = _product(codes_TN[rows], scale_TB[rows], weight[expert])
        results.append(y_TO.to(x_TN.dtype))
    return tuple(results)


def _product(codes_TN: Tensor, scale_TB: Tensor, weight: QuantizedWeight) -> Tensor:
    y_TO = torch.zeros(len(codes_TN), weight.shape[-2], device=codes_TN.device)
    for number, codes_TS in enumerate(codes_TN.split(SLAB, -1)):
        values_OS, scale_O = weight.slab(number)
        sums_TO = (codes_TS.double() @ values_OS.double().T).float()
        y_TO += sums_TO * (scale_TB[:, number, None] * scale_O)
    return y_TO


def _runs(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count
