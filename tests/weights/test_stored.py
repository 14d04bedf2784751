"""Weights with their scales: pairing, block grids, scales that are no numbers, and every way from form to form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8
from leadline.weights import stored as stored_module
from leadline.weights.header import CheckpointError
from leadline.weights.stored import FP4, FP8, PLAIN, Quantized, StoredReader, as_float, encode, pieces, scale_shape

E8M0 = torch.float8_e8m0fnu


def fp8_weight(rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    codes, scale = fp8.quantize_weight(torch.randn(rows, columns))
    if scale_dtype == E8M0:
        scale = e8m0.encode(scale).view(E8M0)
    return {"a.weight": codes.contiguous(), "a.scale": scale.contiguous()}


def fp4_weight(rows: int, columns: int) -> dict[str, Tensor]:
    codes, scale = fp4.quantize(torch.randn(rows, columns))
    return {"a.weight": codes.view(torch.int8), "a.scale": e8m0.encode(scale).view(E8M0)}


def folder_of(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("names", [("a.weight", "a.scale"), ("a.weight", "a.weight_scale_inv"), ("a", "a_scale_inv")])
@pytest.mark.parametrize("scale_dtype", [torch.float32, E8M0], ids=str)
def test_codes_and_scales_are_one_weight(tmp_path: Path, names: tuple[str, str], scale_dtype: torch.dtype) -> None:
    weight = fp8_weight(200, 130, scale_dtype)
    folder = folder_of(tmp_path, {names[0]: weight["a.weight"], names[1]: weight["a.scale"], "b": torch.ones(3)})
    reader = StoredReader(folder)
    assert list(reader.entries) == ["b", names[0]] or list(reader.entries) == [names[0], "b"]
    entry = reader.entries[names[0]]
    assert (entry.format, entry.shape, entry.scale, entry.scale_dtype) == (FP8, (200, 130), names[1], scale_dtype)
    assert entry.num_bytes == 200 * 130 + 4 * scale_dtype.itemsize
    value = reader.read(names[0])
    assert isinstance(value, Quantized)
    assert torch.equal(value.float(), fp8.dequantize_weight(weight["a.weight"], weight["a.scale"]))
    assert reader.entries["b"].format == PLAIN
    assert isinstance(reader.read("b"), Tensor)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_four_bit_codes_count_twice(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = fp4_weight(5, 64)
    folder = folder_of(tmp_path, {"a.weight": weight["a.weight"].view(dtype), "a.scale": weight["a.scale"]})
    reader = StoredReader(folder)
    assert (reader.entries["a.weight"].format, reader.entries["a.weight"].shape) == (FP4, (5, 64))
    assert torch.equal(as_float(reader.read("a.weight")), fp4.dequantize(weight["a.weight"], weight["a.scale"]))


def test_a_small_parameter_called_scale_is_no_scale_of_a_weight(tmp_path: Path) -> None:
    """transformers names a parameter of its hyper-connections so."""
    tensors = {"layers.0.attn_hc.scale": torch.ones(3), "layers.0.attn_hc.fn": torch.ones(2, 2)}
    assert set(StoredReader(folder_of(tmp_path, tensors)).entries) == set(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.weight": fp8_weight(4, 4)["a.weight"]},
            r"tensor a\.weight is F8_E4M3 \[4, 4\].* lacks its scales, a\.scale",
        ),
        ({"a.weight": fp4_weight(4, 32)["a.weight"]}, r"tensor a\.weight is I8 \[4, 16\].* lacks its scales, a\.scale"),
        (
            fp8_weight(4, 4) | {"a.scale": torch.ones(2, 1)},
            r"tensor a\.scale is F32 \[2, 1\], a\.weight F8_E4M3 \[4, 4\] needs \[1, 1\], one for each 128 x 128",
        ),
        (
            fp4_weight(4, 64) | {"a.scale": torch.ones(1, 1)},
            r"tensor a\.scale is F32 \[1, 1\], a\.weight I8 \[4, 32\] needs \[4, 2\], one for each 32 values",
        ),
        (fp8_weight(4, 4) | {"a.scale": torch.ones(1)}, r"a\.scale is F32 \[1\], .* needs \[1, 1\]"),
        (
            fp8_weight(4, 4) | {"a.scale": torch.ones(1, 1).half()},
            r"a\.scale is F16 \[1, 1\], scales are F32 or F8_E8M0",
        ),
        ({"a.weight": torch.ones(4).to(torch.float8_e4m3fn), "a.scale": torch.ones(1)}, r"a\.weight is .* no matrix"),
        ({"a.weight": torch.ones(4, 24).to(torch.int8), "a.scale": torch.ones(4, 1)}, r"a\.weight is .* whole blocks"),
        (
            {"a.weight": torch.tensor(1, dtype=torch.int8), "a.scale": torch.ones(1)},
            r"a\.weight is I8 \[\], which is no",
        ),
    ],
    ids=["no scale", "no scale of fp4", "grid", "grid of fp4", "flat grid", "dtype", "vector", "odd width", "scalar"],
)
def test_what_cannot_be_a_weight_is_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        StoredReader(folder_of(tmp_path, tensors))
    assert str(caught.value).startswith(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_scales_are_named_with_their_place(tmp_path: Path, wrong: float) -> None:
    weight = fp8_weight(300, 200)
    weight["a.scale"][2, 1] = wrong
    reader = StoredReader(folder_of(tmp_path, weight))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: tensor a\.scale holds the scale .* at \[2, 1\]"
        ):
            reader.read("a.weight")


def test_the_nan_of_e8m0_is_found(tmp_path: Path) -> None:
    weight = fp4_weight(3, 64)
    weight["a.scale"].view(torch.uint8)[1, 1] = 255
    with pytest.raises(CheckpointError, match=r"tensor a\.scale holds the scale nan at \[1, 1\]"):
        StoredReader(folder_of(tmp_path, weight)).read("a.weight")


@pytest.mark.parametrize("height", [0, 1, 127, 128, 129, 300])
@pytest.mark.parametrize("form", [PLAIN, FP8, FP4])
def test_pieces_join_to_the_whole(monkeypatch: pytest.MonkeyPatch, height: int, form: str) -> None:
    monkeypatch.setattr(stored_module, "VALUES_PER_PIECE", 64 * 130)
    weight = torch.randn(height, 64)
    value = weight if form == PLAIN else Quantized(form, *encode(weight, form, torch.float32, "a"))
    found = list(pieces(value))
    assert len(found) == -(-height // 128)
    assert all(piece.shape[0] <= 128 for piece in found)
    if found:
        assert torch.equal(torch.cat([as_float(piece) for piece in found]), as_float(value))


def test_what_has_no_rows_is_one_piece() -> None:
    assert [piece.shape for piece in pieces(torch.ones(3))] == [(3,)]
    assert [piece.shape for piece in pieces(torch.tensor(2.0))] == [()]


# -- from form to form --


@given(st.integers(1, 300), st.sampled_from([32, 64, 160]), st.sampled_from([torch.float32, E8M0]))
def test_four_bits_in_eight_and_in_sixteen_are_exact_and_come_back(
    rows: int, columns: int, scales: torch.dtype
) -> None:
    weight = torch.randn(rows, columns) * torch.rand(rows, 1).mul(8).sub(4).exp2()
    four = Quantized(FP4, *encode(weight, FP4, E8M0, "a"))
    eight = Quantized(FP8, *encode(four, FP8, scales, "a"))
    (plain,) = encode(eight, PLAIN, torch.bfloat16, "a")
    assert torch.equal(four.float(), eight.float())
    assert torch.equal(four.float(), plain.float())
    # Codes may differ: a block whose largest value was rounded down to 3 gets half the scale, and the same values.
    assert torch.equal(Quantized(FP4, *encode(plain, FP4, E8M0, "a")).float(), plain.float())
    assert torch.equal(as_float(Quantized(FP8, *encode(plain, FP8, scales, "a"))), plain.float())


@pytest.mark.parametrize(("found", "wanted"), [(torch.float32, E8M0), (E8M0, torch.float32), (E8M0, E8M0)], ids=str)
def test_scales_change_their_dtype_and_not_the_codes(found: torch.dtype, wanted: torch.dtype) -> None:
    value = Quantized(FP8, *encode(torch.randn(150, 140), FP8, found, "a"))
    codes, scale = encode(value, FP8, wanted, "a")
    assert scale.dtype == wanted
    assert torch.equal(codes.view(torch.uint8), value.codes.view(torch.uint8))
    assert torch.equal(e8m0.to_float32(scale), e8m0.to_float32(value.scale))


def test_scales_that_are_no_powers_of_two_stay_in_float32_and_are_rounded_for_e8m0() -> None:
    codes, _ = fp8.quantize_weight(torch.randn(128, 128))
    value = Quantized(FP8, codes, torch.tensor([[0.003]]))
    same = encode(value, FP8, torch.float32, "a")
    assert torch.equal(same[1], value.scale)
    other = Quantized(FP8, *encode(value, FP8, E8M0, "a"))
    assert not torch.equal(other.float(), value.float())
    assert (other.float() - value.float()).abs().max() <= value.float().abs().max() / 16


def test_blocks_too_uneven_for_eight_bits_are_named() -> None:
    weight = torch.ones(2, 64)
    weight[1, 32:] = 2.0**-15
    four = Quantized(FP4, *encode(weight, FP4, E8M0, "layers.0.x"))
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.x: the sub-scales of block \[0, 0\] differ by 2\^15"):
        encode(four, FP8, E8M0, "layers.0.x")


@pytest.mark.parametrize("form", [FP8, FP4])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_quantised(form: str, wrong: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 3] = wrong
    with pytest.raises(CheckpointError, match=f"tensor a: holds infinity or NaN, which no {form.upper()} block"):
        encode(weight, form, torch.float32, "a")


def test_integers_stay_as_they_are() -> None:
    numbers = torch.arange(6).reshape(2, 3)
    assert encode(numbers, PLAIN, torch.bfloat16, "a")[0] is numbers


def test_shapes_of_scales() -> None:
    assert scale_shape(FP8, (8, 300, 128)) == (8, 3, 1)
    assert scale_shape(FP4, (8, 300, 128)) == (8, 300, 4)
