"""Adds the copy engine of Hopper and a little assembly to the stand-in for Gluon (`gluon_interpreter.py`).

A copy of a tile lands when its mbarrier is waited for, and until then its target holds NaN. The bytes that an mbarrier
was told to expect must be those of the copies that name it. What lies outside of a tensor arrives as zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Descriptor:
    """A tensor that is copied tile by tile."""

    tensor: Tensor
    block_shape: list[int]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def tile(self, corner: list[Any]) -> Tensor:
        tile = torch.zeros(self.block_shape, dtype=torch.float32 if self.dtype == torch.float32 else torch.uint8)
        source = self.tensor.view(tile.dtype)
        inside = [
            slice(int(start), min(int(start) + size, limit))
            for start, size, limit in zip(corner, self.block_shape, source.shape, strict=True)
        ]
        part = source[tuple(inside)]
        tile[tuple(slice(0, size) for size in part.shape)] = part
        return tile.view(self.dtype)


class Registers:
    """A product's operand that is no shared memory."""

    def __init__(self, data: Tensor):
        self.data, self.notes = data.clone(), {"unfenced": torch.zeros(1, dtype=torch.bool)}

    def begin_read(self) -> None: ...

    def was_read(self) -> None: ...


def permuted_bytes(low: Tensor, high: Tensor, selectors: Tensor) -> Tensor:
    """The instruction `prmt`: byte i of the result is byte s_i mod 8 of [low, high]; if s_i >= 8, its sign 8 times."""
    result = torch.zeros_like(selectors)
    both = low | (high << 32)
    for place in range(4):
        selector = (selectors >> (4 * place)) & 15
        byte = (both >> (8 * (selector & 7))) & 0xFF
        byte = torch.where(selector >= 8, torch.where(byte >= 128, 0xFF, 0), byte)
        result |= byte << (8 * place)
    return result


def assemble(text: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run PTX of the few instructions used, over words in int64."""
    words = dict(inputs)

    def value(name: str) -> Tensor:
        return words[name] if name in words else torch.tensor(int(name, 0))

    for line in re.findall(r"[^;{}]+", text):
        instruction, _, rest = line.strip().partition(" ")
        if not instruction or instruction == ".reg":
            continue
        target, *names = [name.strip() for name in rest.split(",")]
        operation = instruction.split(".")[0]
        operands = [value(name) for name in names]
        if operation == "mov":
            result = operands[0]
        elif operation == "and":
            result = operands[0] & operands[1]
        elif operation == "shr":
            result = operands[0] >> operands[1]
        elif operation == "shl":
            result = (operands[0] << operands[1]) & 0xFFFFFFFF
        elif operation == "prmt":
            low, high, selectors = torch.broadcast_tensors(*operands)
            result = permuted_bytes(low, high, selectors)
        elif operation == "lop3":
            assert int(names[3], 0) == 0xF8, "a | (b & c) is the one function known here"
            result = operands[0] | (operands[1] & operands[2])
        else:
            raise AssertionError(f"unknown instruction {instruction}")
        words[target] = result
    return words


def _inline_asm(text: str, _constraints: str, arguments: list[Tensor], _dtypes: Any, _pure: bool, pack: int) -> Any:
    """One run for each word of four bytes; of arguments with four bytes an element, for the first of each four."""
    assert pack == 4
    inputs, number = {}, 2
    for argument in arguments:
        argument = argument.as_subclass(Tensor)
        if argument.element_size() == 1:
            inputs[f"${number}"] = argument.contiguous().view(torch.int32).long() & 0xFFFFFFFF
            number += 1
        else:
            for place in range(4):
                inputs[f"${number + place}"] = argument[:, place::4].long() & 0xFFFFFFFF
            number += 4
    words = assemble(text, inputs)
    results = []
    for name in ("$0", "$1"):
        signed = torch.where(words[name] >= 2**31, words[name] - 2**32, words[name]).to(torch.int32)
        results.append(signed.contiguous().view(torch.int8))
    return results


class Integer(int):
    """A constant of a kernel file."""

    @property
    def value(self) -> int:
        return int(self)


def with_copy_engine(gluon: Any, *files: Path) -> Any:
    """`gluon.Kernels` of files that use descriptors, mbarriers that count bytes, assembly and formats of one byte."""
    plain = gluon.constexpr
    gluon.constexpr = lambda value: (
        value if isinstance(value, str) else (Integer(value) if isinstance(value, int) else plain(value))
    )
    kernels = gluon.Kernels(*files)
    _add(gluon, kernels)
    return kernels


def _add(gluon: Any, kernels: Any) -> None:
    device = kernels.device
    plain_to = torch.Tensor.to

    class MBarrier(gluon.MBarrier):
        def __init__(self, count: int):
            super().__init__(count)
            self.expected, self.tiles = 0, []

        def land(self) -> None:
            super().land()
            if not self.tiles:
                return
            assert sum(tile.numel() * tile.element_size() for _, tile in self.tiles) == self.expected
            actor = device.partitions.actors[-1]  # the one that copies
            actor.landed += 1
            clock = actor.clock.clone()
            clock[2 * actor.number + 1] = actor.landed
            for target, tile in self.tiles:
                target.data.view(torch.uint8).copy_(tile.view(torch.uint8))
                target.wrote(2 * actor.number + 1, actor.landed)
                target.notes["unfenced"].fill_(False)
            self.expected, self.tiles = 0, []
            self.arrive(1, clock)

    def init(place: Any, count: int) -> None:
        device.mbarriers[place.data.data_ptr()] = MBarrier(count)

    def expect(place: Any, size: int) -> None:
        mbarrier = device.mbarrier(place)
        assert not mbarrier.tiles, "the copies of the phase before have not landed"
        mbarrier.expected = size

    def copy(descriptor: Descriptor, corner: list[Any], place: Any, target: Any) -> None:
        assert list(target.shape) == list(descriptor.block_shape)
        assert target.data.storage_offset() * target.data.element_size() % 128 == 0, "a copy to no multiple of 128"
        assert int(corner[-1]) * descriptor.tensor.element_size() % 16 == 0, "a copy from no multiple of 16 bytes"
        target.begin_write()
        target.data.view(torch.uint8).fill_(0xFF)
        target.notes["landing"].fill_(True)
        device.mbarrier(place).tiles.append((target, descriptor.tile(corner)))

    def to(x: Tensor, dtype: torch.dtype, bitcast: bool = False) -> Any:
        if bitcast:
            words = x.as_subclass(Tensor)
            # A constant among integers makes them int64 here.
            words = plain_to(words, torch.int32) if words.dtype == torch.int64 else words
            return gluon.block(words.contiguous().view(dtype))
        return plain_to(x, dtype)

    def product(a: Any, b: Any, start: Any, max_num_imprecise_acc: int, **options: Any) -> Any:
        return device.product(Registers(a) if isinstance(a, Tensor) else a, b, start, **options)

    gluon.Block.to = to
    names = kernels.names
    names["mbarrier"].init, names["mbarrier"].expect = init, expect
    names["tma"] = SimpleNamespace(async_copy_global_to_shared=copy)
    names["warpgroup_mma"] = product
    names["gl"].inline_asm_elementwise = lambda *call: [gluon.block(x) for x in _inline_asm(*call)]
    names["gl"].DotOperandLayout = lambda *_: None
    names["gl"].uint8, names["gl"].int8, names["gl"].float8e4nv = torch.uint8, torch.int8, torch.float8_e4m3fn
