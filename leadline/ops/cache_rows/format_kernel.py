"""Number formats in Triton: E4M3, E2M1 and their E8M0 scales, to floats and back, for every kernel that needs them.

Codes are turned into floats by moving their bits. E4M3 has the layout of a float with a smaller exponent field: its
seven bits behind the sign, put at the top of a float32's exponent and mantissa, are the value times 2^-120, subnormal
codes included, and one exact product repairs that. The same goes for E2M1, with 2^-126. It works alike on every GPU and
under the interpreter, and no rounding is involved.

Rounding comes first and stays in float32: to nearest even by integer arithmetic, which rounds the bits that are cut off
into the rest; below the smallest normal value a number that is large enough is added and taken away again, so that the
adder rounds at the place of the smallest subnormal. The code of a rounded value is then the way to floats backwards.
`formats` holds the same in plain PyTorch; the bits agree.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e8m0_to_float(code):
    """2^(code - 127) of uint8 or int32 codes; 255 is NaN."""
    bits = tl.where(code == 0, 0x400000, code.to(tl.int32) << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_inverse(code):
    """2^(127 - code) of int32 codes. The floors of the formats keep it normal; of 255 it is any number."""
    return ((254 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def largest_magnitude(x):
    """Over the last axis of FP32 x, as the bits of a float: they are ordered like magnitudes, and NaN is above
    infinity."""
    return tl.max((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), len(x.shape) - 1)


@triton.jit
def scale_codes(magnitude, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    """E8M0 codes, int32, of blocks with this `largest_magnitude`, as `formats.e8m0.block_scale` and `encode` give
    them. LARGEST, FLOOR: of the format, fp8 or fp4."""
    wanted = tl.maximum(magnitude.to(tl.float32, bitcast=True), FLOOR) * (1.0 / LARGEST)
    bits = wanted.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.where(magnitude < 0x7F800000, exponent, 255)


@triton.jit
def _round_bits(x, SHIFT: tl.constexpr, LARGEST: tl.constexpr, SMALLEST_NORMAL: tl.constexpr):
    """x to nearest even where the last SHIFT bits of a float's mantissa are cut off. What is above LARGEST becomes
    LARGEST, and what is below SMALLEST_NORMAL a multiple of its last place."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
    whole = magnitude.to(tl.int32, bitcast=True)
    normal = (whole + ((1 << (SHIFT - 1)) - 1) + ((whole >> SHIFT) & 1)) & (-1 << SHIFT)
    adder: tl.constexpr = SMALLEST_NORMAL * 2.0**SHIFT
    subnormal = ((magnitude + adder) - adder).to(tl.int32, bitcast=True)
    rounded = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    return (rounded | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def round_to_e4m3(x):
    """FP32 x as the nearest values of E4M3, in FP32; NaN becomes a number."""
    return _round_bits(x, 20, 448.0, 0.015625)


@triton.jit
def round_to_e2m1(x):
    """FP32 x as the nearest values of E2M1, in FP32; NaN becomes a number."""
    return _round_bits(x, 22, 6.0, 1.0)


@triton.jit
def round_to_bfloat16(x):
    """FP32 x as the nearest values of bfloat16, in FP32. A cast would do the same, but not under the interpreter."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def e4m3_to_float(code):
    """Values of uint8 codes. The two codes of NaN become 480: a block that holds one has NaN for a scale."""
    code = code.to(tl.int32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def e4m3_codes(x):
    """Codes, uint8, of FP32 values to nearest even, at most 448 in magnitude but for rounding."""
    bits = (round_to_e4m3(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)  # 2^-120
    return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e2m1_to_float(code):
    """Values of codes 0..15 in int32."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e2m1_codes(x):
    """Codes 0..15, int32, of FP32 values to nearest even, at most 6 in magnitude but for rounding."""
    bits = (round_to_e2m1(x) * 1.1754943508222875e-38).to(tl.int32, bitcast=True)  # 2^-126
    return ((bits >> 22) & 7) | ((bits >> 28) & 8)
