"""Packed cache entries: their size, their bytes, and that packing loses nothing that rounding did not."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import cache_entry, fp4, fp8

WIDTHS = [(512, 64), (96, 32), (80, 16), (32, 16), (72, 8), (1024, 64)]


def vectors(rows: int, width: int, seed: int) -> Tensor:
    """Rows of very different sizes, with zeros, subnormal results and outliers among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= 10.0 ** torch.randint(-6, 5, (rows, 1), generator=generator)
    x *= 2.0 ** torch.randint(-12, 3, x.shape, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    return x


def test_the_released_models_take_584_and_68_bytes() -> None:
    assert cache_entry.key_widths(512, 64) == (576, 8)
    assert cache_entry.index_widths(128) == (64, 4)


@pytest.mark.parametrize(("width", "rotary"), WIDTHS)
def test_shapes(width: int, rotary: int) -> None:
    payload, scales = cache_entry.pack_keys(torch.randn(2, 3, width), rotary)
    assert (payload.dtype, scales.dtype) == (torch.uint8, torch.uint8)
    assert (payload.shape[-1], scales.shape[-1]) == cache_entry.key_widths(width, rotary)
    assert payload.shape[:-1] == scales.shape[:-1] == (2, 3)
    assert scales.shape[-1] % 8 == 0
    assert payload.is_contiguous()


def test_every_byte_of_a_key() -> None:
    """Two blocks of 64 by hand: 1.0 is code 0x38 under scale 1, 448 is 0x7e; -2.5 in BF16 is 0xc020."""
    x = torch.zeros(132)
    x[0], x[1] = 448.0, 1.0  # scale 2^0
    x[64] = 3.5  # 448 times 2^-7
    x[130] = -2.5
    payload, scales = cache_entry.pack_keys(x, 4)
    assert payload[:2].tolist() == [0x7E, 0x38]
    assert int(payload[64]) == 0x7E
    assert bytes(payload[128:].tolist()) == struct.pack("<4H", 0, 0, 0xC020, 0)
    assert int(payload.count_nonzero()) == 5
    assert scales.tolist() == [127, 120, 0, 0, 0, 0, 0, 0]


def test_every_byte_of_an_index_key() -> None:
    """E2M1 codes 1..7 are 0.5, 1, 1.5, 2, 3, 4, 6, plus 8 when negative."""
    x = torch.zeros(64)
    x[:4] = torch.tensor([0.5, -1.0, 3.0, 6.0])
    x[63] = 6.0 * 2.0**-5
    codes, scales = cache_entry.pack_index(x)
    assert codes[:2].tolist() == [0x1 | 0xA << 4, 0x5 | 0x7 << 4]
    assert int(codes[31]) == 0x7 << 4
    assert int(codes.count_nonzero()) == 3
    assert scales.tolist() == [127, 122]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30)
@given(shape=st.sampled_from(WIDTHS), seed=st.integers(0, 999))
def test_unpacking_gives_the_rounded_key(dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    width, rotary = shape
    x = vectors(5, width, seed).to(dtype)
    found = cache_entry.unpack_keys(cache_entry.pack_keys(x, rotary), rotary, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, cache_entry.round_keys(x, rotary))
    assert torch.equal(found[:, :-rotary], fp8.fake_quantize(x[:, :-rotary], 64))
    assert torch.equal(found[:, -rotary:], x[:, -rotary:].bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30)
@given(width=st.sampled_from([32, 64, 128]), seed=st.integers(0, 999))
def test_unpacking_gives_the_rounded_index_key(dtype: torch.dtype, width: int, seed: int) -> None:
    x = vectors(5, width, seed).to(dtype)
    assert torch.equal(cache_entry.unpack_index(cache_entry.pack_index(x), dtype), fp4.fake_quantize(x))


@settings(max_examples=50)
@given(shape=st.sampled_from(WIDTHS), seed=st.integers(0, 999))
def test_packing_what_was_rounded_keeps_every_value(shape: tuple[int, int], seed: int) -> None:
    """The scale may halve, when the largest value of a block was rounded down to a border; the values do not move."""
    width, rotary = shape
    rounded = cache_entry.round_keys(vectors(5, width, seed), rotary)
    again = cache_entry.unpack_keys(cache_entry.pack_keys(rounded, rotary), rotary, torch.float32)
    assert torch.equal(again, rounded)
    rounded = fp4.fake_quantize(vectors(5, 64, seed))
    assert torch.equal(cache_entry.unpack_index(cache_entry.pack_index(rounded), torch.float32), rounded)


def test_a_block_rounded_down_to_a_border() -> None:
    """224.5 becomes 224 under scale 1, which is 448 under scale 1/2; 3.1 becomes 3, which is 6 under scale 1/2."""
    x = torch.full((80,), 1.0625)
    x[0] = 224.5
    first = cache_entry.pack_keys(x, 16)
    rounded = cache_entry.unpack_keys(first, 16, torch.float32)
    second = cache_entry.pack_keys(rounded, 16)
    assert (int(first.scales[0]), int(second.scales[0])) == (127, 126)
    assert torch.equal(cache_entry.unpack_keys(second, 16, torch.float32), rounded)
    x = torch.full((32,), 1.0)
    x[0] = 3.1
    rounded = fp4.fake_quantize(x)
    packed = cache_entry.pack_index(rounded)
    assert packed.scales.tolist() == [126]
    assert torch.equal(cache_entry.unpack_index(packed, torch.float32), rounded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_visible(bad: float) -> None:
    x = torch.ones(144)
    x[70] = bad
    found = cache_entry.unpack_keys(cache_entry.pack_keys(x, 16), 16, torch.float32)
    assert found[64:128].isnan().all()
    assert torch.equal(found[:64], x[:64])
    x = torch.ones(64)
    x[40] = bad
    found = cache_entry.unpack_index(cache_entry.pack_index(x), torch.float32)
    assert found[32:].isnan().all()
    assert torch.equal(found[:32], x[:32])


def test_an_index_key_of_no_whole_blocks() -> None:
    with pytest.raises(ValueError, match="an index key of 48 values cannot be packed"):
        cache_entry.index_widths(48)
