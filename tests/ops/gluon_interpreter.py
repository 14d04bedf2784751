"""Runs Gluon kernels on the CPU, a program at a time, and watches what they do with shared memory.

Triton's interpreter does not know Gluon. This one executes the source of a kernel file with stand-ins for the modules
that it imports. Blocks are torch tensors, layouts mean nothing, so what it proves is arithmetic, addresses and masks.
And it is stricter than a device about time:

- A copy lands when it is waited for; until then its target holds NaN.
- A product in flight is computed when it is issued and again when it is waited for; if its operands changed, it fails.
- What threads or copies wrote to shared memory may be read after a barrier, and by products after a proxy fence too.
- Shared memory that was read may be written again after a barrier.
- An address outside of its tensor fails, unless it is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SPAN = 2**40  # addresses between one tensor and the next


class Block(torch.Tensor):
    """A tensor whose type names a layout, as in Gluon."""

    @property
    def type(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SimpleNamespace(layout=None)


def block(x: Any, dtype: torch.dtype | None = None) -> Block:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Block)


class Pointer:
    """Addresses of elements: the number of a tensor times SPAN, plus the place in it."""

    def __init__(self, memory: Memory, address: Tensor, dtype: torch.dtype):
        self.memory, self.address, self.element = memory, address, dtype

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.element)

    def __add__(self, places: Any) -> Pointer:
        return Pointer(self.memory, self.address + torch.as_tensor(places).long(), self.element)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.address[key], self.element)


class Memory:
    """The tensors of one launch."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def pointer(self, tensor: Tensor) -> Pointer:
        assert tensor.is_contiguous()
        self.tensors.append(tensor)
        return Pointer(self, block((len(self.tensors) - 1) * SPAN), tensor.dtype)

    def _split(self, pointer: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
        address, mask = torch.broadcast_tensors(pointer.address, torch.as_tensor(True if mask is None else mask))
        return address.as_subclass(Tensor), mask.as_subclass(Tensor)

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Block:
        address, mask = self._split(pointer, mask)
        result = torch.full(address.shape, other, dtype=pointer.element)
        for number in (address[mask] // SPAN).unique().tolist():
            here = mask & (address // SPAN == number)
            place = address[here] % SPAN
            assert int(place.max()) < self.tensors[number].numel(), "address out of bounds"
            result[here] = self.tensors[number].view(-1)[place]
        return block(result)

    def store(self, pointer: Pointer, value: Tensor, mask: Any = None) -> None:
        address, mask = self._split(pointer, mask)
        value = torch.broadcast_to(value.as_subclass(Tensor), address.shape)
        for number in (address[mask] // SPAN).unique().tolist():
            here = mask & (address // SPAN == number)
            place = address[here] % SPAN
            assert int(place.max()) < self.tensors[number].numel(), "address out of bounds"
            self.tensors[number].view(-1)[place] = value[here].to(self.tensors[number].dtype)


class Shared:
    """Shared memory, or a part of it. Flags by element: written or read since the last barrier, written since the last
    proxy fence, and target of a copy that has not landed."""

    FLAGS = ("written", "read", "unfenced", "landing")

    def __init__(self, data: Tensor, flags: dict[str, Tensor]):
        self.data, self.flags = data, flags

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def _view(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(view(self.data), {name: view(flag) for name, flag in self.flags.items()})

    def index(self, number: Any) -> Shared:
        return self._view(lambda x: x[int(number)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(lambda x: x.narrow(dim, start, length))

    def permute(self, order: list[int]) -> Shared:
        return self._view(lambda x: x.permute(order))

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape
        assert value.dtype == self.data.dtype
        self.begin_write()
        self.data.copy_(value)
        self.flags["written"].fill_(True)
        self.flags["unfenced"].fill_(True)

    def load(self, _layout: Any) -> Block:
        self.begin_read()
        self.flags["read"].fill_(True)
        return block(self.data.clone())

    def begin_write(self) -> None:
        assert not self.flags["read"].any(), "written before a barrier behind the last read"
        assert not self.flags["landing"].any(), "written while a copy is under way"

    def begin_read(self) -> None:
        assert not self.flags["landing"].any(), "read while a copy is under way"
        assert not self.flags["written"].any(), "read before a barrier behind the last write"


class Flying:
    """A product in flight."""

    def __init__(self, operands: list[Any], start: Tensor):
        self.operands, self.start, self.now = operands, start, self._compute(operands, start)

    @staticmethod
    def _compute(operands: list[Any], start: Tensor) -> Tensor:
        total = start
        for a, b in operands:
            total = total + a.data.float() @ b.data.float()
        return total

    def landed(self) -> Block:
        again = self._compute(self.operands, self.start)
        assert torch.equal(again.nan_to_num(7.0), self.now.nan_to_num(7.0)), "an operand changed under a product"
        for a, b in self.operands:
            a.flags["read"].fill_(True)
            b.flags["read"].fill_(True)
        return block(again)


class Device:
    """One program: its index, its shared memory, its copies."""

    def __init__(self) -> None:
        self.memory, self.program = Memory(), (0, 0)
        self.begin((0, 0))

    def begin(self, program: tuple[int, int]) -> None:
        self.program, self.allocations, self.copies = program, [], []
        self.open_group: list[tuple[Shared, Tensor]] = []

    def allocate(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Shared:
        data = torch.full(shape, float("nan"), dtype=dtype)
        part = Shared(data, {name: torch.zeros(shape, dtype=torch.bool) for name in Shared.FLAGS})
        self.allocations.append(part)
        return part

    def copy(self, target: Shared, pointer: Pointer, mask: Any = None) -> None:
        target.begin_write()
        target.data.fill_(float("nan"))
        target.flags["landing"].fill_(True)
        self.open_group.append((target, self.memory.load(pointer, mask)))

    def commit(self) -> None:
        self.copies.append(self.open_group)
        self.open_group = []

    def wait_copies(self, outstanding: int = 0) -> None:
        while len(self.copies) > outstanding:
            for target, value in self.copies.pop(0):
                target.data.copy_(value)
                target.flags["landing"].fill_(False)
                target.flags["written"].fill_(True)
                target.flags["unfenced"].fill_(True)

    def barrier(self) -> None:
        for part in self.allocations:
            part.flags["written"].fill_(False)
            part.flags["read"].fill_(False)

    def fence(self) -> None:
        for part in self.allocations:
            part.flags["unfenced"].logical_and_(part.flags["landing"])

    def product(self, a: Shared, b: Shared, start: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        for operand in (a, b):
            operand.begin_read()
            assert not operand.flags["unfenced"].any(), "no proxy fence before a product"
        operands = [(a, b)]
        if isinstance(start, Flying):
            assert use_acc
            operands, start = [*start.operands, (a, b)], start.start
        flying = Flying(operands, start if use_acc else torch.zeros_like(start))
        return flying if is_async else flying.landed()


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return Pointer(a.memory, torch.where(torch.as_tensor(condition), a.address, b.address), a.element)
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block)


class Constant(float):
    @property
    def value(self) -> float:
        return self


def constexpr(value: Any) -> Any:
    return Constant(value) if isinstance(value, float) else SimpleNamespace(value=value)


def _layout(*_: Any) -> None:
    return None


def _language(device: Device) -> SimpleNamespace:
    return SimpleNamespace(
        constexpr=constexpr, int32=torch.int32, int64=torch.int64, float32=torch.float32,
        NVMMASharedLayout=_layout, NVMMADistributedLayout=_layout, BlockedLayout=_layout, SliceLayout=_layout,
        DistributedLinearLayout=_layout, SwizzledSharedLayout=_layout,
        program_id=lambda axis: block(device.program[axis]),
        cdiv=lambda a, b: (a + b - 1) // b,
        arange=lambda start, end, layout=None: block(torch.arange(start, end, dtype=torch.int32)),
        full=lambda shape, value, dtype, layout=None: block(torch.full(shape, value, dtype=dtype)),
        zeros=lambda shape, dtype, layout=None: block(torch.zeros(shape, dtype=dtype)),
        load=device.memory.load, store=device.memory.store, where=where,
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block),
        max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
        exp=torch.exp, exp2=torch.exp2, log=torch.log, log2=torch.log2,
        join=lambda a, b: torch.stack([a, b], dim=-1), split=lambda x: x.unbind(-1),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        allocate_shared_memory=device.allocate, thread_barrier=device.barrier, static_range=range,
    )  # fmt: skip


def jit(function: Any = None, **_: Any) -> Any:
    return (lambda function: function) if function is None else function


class Kernels:
    """The functions of a Gluon file, to be launched with `run`."""

    def __init__(self, file: Path):
        self.device = Device()
        self.names: dict[str, Any] = {"__name__": "interpreted"}
        source = file.read_text()
        first, last = source.index("from triton"), source.rindex("from triton")
        end = source.index(")\n", last) + 2  # of the last import, in brackets
        self.names |= {
            "gluon": SimpleNamespace(jit=jit),
            "gl": _language(self.device),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self.device.copy,
                commit_group=self.device.commit,
                wait_group=self.device.wait_copies,
            ),
            "fence_async_shared": self.device.fence,
            "warpgroup_mma": self.device.product,
            "warpgroup_mma_init": lambda start: start,
            "warpgroup_mma_wait": lambda outstanding, deps: (
                deps[0].landed() if isinstance(deps[0], Flying) else deps[0]
            ),
        }
        blank = "\n" * source[first:end].count("\n")  # keeps the numbers of the lines
        exec(compile(source[:first] + blank + source[end:], str(file), "exec"), self.names)

    def run(self, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel: tensors become pointers, numbers stay, None means an operand that is not there."""
        self.device.memory.tensors.clear()
        values = [self.device.memory.pointer(x) if isinstance(x, Tensor) else x for x in arguments]
        for second in range(grid[1] if len(grid) > 1 else 1):
            for first in range(grid[0]):
                self.device.begin((first, second))
                self.names[name](*values, **constants)
