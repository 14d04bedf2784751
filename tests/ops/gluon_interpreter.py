"""Runs Gluon kernels on the CPU, a program at a time, and watches what they do with shared memory.

Triton's interpreter does not know Gluon. This one executes the source of kernel files with stand-ins for the modules
that they import. Blocks are torch tensors, layouts mean nothing, so what it proves is arithmetic, addresses and masks.
And it is stricter than a device about time:

- A copy lands when it is waited for; until then its target holds NaN.
- A product in flight is computed when it is issued and again when it is waited for; if its operands changed, it fails.
- What threads or copies wrote to shared memory may be read after a barrier, and by products after a proxy fence too.
- Shared memory that was read may be written again after a barrier.
- An address outside of its tensor fails, unless it is masked.

The partitions of a specialised kernel are actors that take turns in random order, switching where they wait for an
mbarrier; when all wait, that is a deadlock, and it fails. Each actor has a clock: for every actor, how many of its
barriers are known here to have passed. An arrival at an mbarrier hands the clock over to those who wait for it. So an
access is in order when the clock of the one who accesses covers what came before, and not just when it went well.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SPAN = 2**40  # addresses between one tensor and the next
THREADS = 128  # of a partition: so many copies arrive at an mbarrier
ACTORS = 4
Clock = Tensor  # [2 ACTORS]: of each actor its barriers, and its copies that have landed


class Block(torch.Tensor):
    """A tensor whose type names a layout, as in Gluon."""

    @property
    def type(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Block:  # pyright: ignore[reportIncompatibleMethodOverride]
        values = self.as_subclass(Tensor)
        return block(values.view(dtype) if bitcast else values.to(dtype))

    def expand_dims(self, axis: int) -> Tensor:
        return self.unsqueeze(axis)


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

    def expand_dims(self, axis: int) -> Pointer:
        return Pointer(self.memory, self.address.unsqueeze(axis), self.element)


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


class Actor:
    """Threads that run the same code: a program, or a partition of it."""

    def __init__(self, number: int, clock: Clock):
        self.number, self.clock, self.time = number, clock.clone(), 1
        self.copies: list[list[tuple[Shared, Tensor]]] = []  # groups under way
        self.open_group: list[tuple[Shared, Tensor]] = []
        self.landed = 0  # copies that an mbarrier has told of

    def barrier(self) -> None:
        self.clock[2 * self.number] = self.time
        self.time += 1


class Shared:
    """Shared memory, or a part of it. Notes by element: who wrote it last (a place of a clock) and when, when each
    actor read it last, whether no proxy fence came since, and whether it is the target of a copy under way."""

    def __init__(self, device: Device, data: Tensor, notes: dict[Any, Tensor]):
        self.device, self.data, self.notes = device, data, notes

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def _view(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(self.device, view(self.data), {name: view(note) for name, note in self.notes.items()})

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
        self.wrote(2 * self.device.actor.number, self.device.actor.time)

    def load(self, _layout: Any) -> Block:
        self.begin_read()
        self.was_read()
        return block(self.data.clone())

    def wrote(self, place: int, time: int) -> None:
        self.notes["writer"].fill_(place)
        self.notes["written"].fill_(time)
        self.notes["unfenced"].fill_(True)
        self.notes["landing"].fill_(False)

    def was_read(self) -> None:
        self.notes[self.device.actor.number].fill_(self.device.actor.time)

    def known(self) -> Tensor:
        """Whether the last write is known here to have come before."""
        return self.device.actor.clock[self.notes["writer"].long()] >= self.notes["written"]

    def begin_write(self) -> None:
        clock = self.device.actor.clock
        for number in range(ACTORS):
            assert (self.notes[number] <= clock[2 * number]).all(), "written before a barrier behind the last read"
        assert not self.notes["landing"].any(), "written while a copy is under way"

    def begin_read(self) -> None:
        assert not self.notes["landing"].any(), "read while a copy is under way"
        assert self.known().all(), "read before a barrier behind the last write"


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
            a.was_read()
            b.was_read()
        return block(again)


class MBarrier:
    """Counts arrivals; when all have come, a phase ends and the next begins."""

    def __init__(self, count: int):
        self.count, self.arrived, self.phase, self.clock = count, 0, 0, torch.zeros(2 * ACTORS, dtype=torch.long)
        # Arrivals that wait for copies to land, with the clock of when these were issued.
        self.copies: list[tuple[Actor, Clock, list[tuple[Shared, Tensor]]]] = []

    def arrive(self, count: int, clock: Clock) -> None:
        self.arrived += count
        self.clock = torch.maximum(self.clock, clock)
        assert self.arrived <= self.count, "more arrivals than the phase has"
        if self.arrived == self.count:
            self.phase, self.arrived = self.phase + 1, 0

    def land(self) -> None:
        """The copies that are waited for arrive at last."""
        for actor, clock, copies in self.copies:
            actor.landed += 1
            place = 2 * actor.number + 1
            for target, value in copies:
                target.data.copy_(value)
                target.wrote(place, actor.landed)
            clock[place] = actor.landed
            self.arrive(THREADS, clock)
        self.copies = []


class Partitions:
    """Runs functions as threads of which one is awake at a time."""

    def __init__(self, device: Device, functions: list[Callable[[], None]], seed: int):
        self.device, self.random, self.turn = device, random.Random(seed), threading.Condition()
        self.ready: list[Callable[[], bool] | None] = [lambda: True for _ in functions]  # None: has ended
        self.failure: BaseException | None = None
        self.awake = -1
        start = device.actor
        start.barrier()
        self.actors = [start, *(Actor(number, start.clock) for number in range(1, len(functions)))]
        threads = [
            threading.Thread(target=self._run, args=(number, function)) for number, function in enumerate(functions)
        ]
        for thread in threads:
            thread.start()
        with self.turn:
            self._choose()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        for actor in self.actors:
            actor.barrier()
            start.clock = torch.maximum(start.clock, actor.clock)
        device.actor = start

    def _run(self, number: int, function: Callable[[], None]) -> None:
        try:
            with self.turn:
                self._sleep(number)
            with torch.no_grad():  # which holds in one thread only
                function()
        except BaseException as failure:  # handed to the thread that launched
            self.failure = self.failure or failure
        with self.turn:
            self.ready[number] = None
            self._choose()

    def wait(self, ready: Callable[[], bool]) -> None:
        with self.turn:
            number = self.device.actor.number
            self.ready[number] = ready
            self._choose()
            self._sleep(number)

    def _sleep(self, number: int) -> None:
        self.turn.wait_for(lambda: self.awake == number or self.failure is not None)
        if self.failure:
            raise RuntimeError("another partition failed")
        self.device.actor = self.actors[number]

    def _choose(self) -> None:
        """Who is awake next; when a partition has failed, all are, and end."""
        try:
            able = [number for number, ready in enumerate(self.ready) if ready is not None and ready()]
            assert able or not any(self.ready), "deadlock: every partition waits"
            self.awake = self.random.choice(able) if able else -1
        except Exception as failure:
            self.failure = self.failure or failure
        self.turn.notify_all()


class Device:
    """One program: its index, its shared memory, its mbarriers and actors."""

    def __init__(self) -> None:
        self.memory, self.programs, self.seed = Memory(), (1, 1), 0
        self.begin((0, 0))

    def begin(self, program: tuple[int, int]) -> None:
        self.program, self.allocations = program, []
        self.mbarriers: dict[int, MBarrier] = {}
        self.partitions: Partitions | None = None
        self.actor = Actor(0, torch.zeros(2 * ACTORS, dtype=torch.long))

    def allocate(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Shared:
        data = torch.full(shape, float("nan")).to(dtype)
        notes: dict[Any, Tensor] = {number: torch.zeros(shape, dtype=torch.long) for number in range(ACTORS)}
        notes |= {name: torch.zeros(shape, dtype=torch.long) for name in ("writer", "written")}
        notes |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("unfenced", "landing")}
        part = Shared(self, data, notes)
        self.allocations.append(part)
        return part

    def copy(self, target: Shared, pointer: Pointer, mask: Any = None) -> None:
        target.begin_write()
        target.data.fill_(float("nan"))
        target.notes["landing"].fill_(True)
        self.actor.open_group.append((target, self.memory.load(pointer, mask)))

    def commit(self) -> None:
        self.actor.copies.append(self.actor.open_group)
        self.actor.open_group = []

    def wait_copies(self, outstanding: int = 0) -> None:
        while len(self.actor.copies) > outstanding:
            for target, value in self.actor.copies.pop(0):
                target.data.copy_(value)
                target.wrote(2 * self.actor.number, self.actor.time)

    def barrier(self) -> None:
        self.actor.barrier()

    def fence(self) -> None:
        for part in self.allocations:
            own = part.notes["writer"] == 2 * self.actor.number
            part.notes["unfenced"].logical_and_(part.notes["landing"] | ~(own | part.known()))

    def product(self, a: Any, b: Shared, start: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        if isinstance(a, Tensor):  # in registers, where nothing can happen to it
            values, a = a, self.allocate(a.dtype, list(a.shape), None)
            a.data.copy_(values)
        for operand in (a, b):
            operand.begin_read()
            assert not operand.notes["unfenced"].any(), "no proxy fence before a product"
        operands = [(a, b)]
        if isinstance(start, Flying):
            assert use_acc
            operands, start = [*start.operands, (a, b)], start.start
        flying = Flying(operands, start if use_acc else torch.zeros_like(start))
        return flying if is_async else flying.landed()

    def mbarrier(self, place: Shared) -> MBarrier:
        return self.mbarriers[place.data.data_ptr()]

    def begin_mbarrier(self, place: Shared, count: int) -> None:
        self.mbarriers[place.data.data_ptr()] = MBarrier(count)

    def arrive(self, place: Shared, count: int = 1, pred: Any = True) -> None:
        if bool(pred):
            self.mbarrier(place).arrive(count, self.actor.clock)

    def arrive_with_copies(self, place: Shared, increment_count: bool) -> None:
        assert not increment_count
        self.mbarrier(place).copies.append((self.actor, self.actor.clock.clone(), self.actor.open_group))
        self.actor.open_group = []

    def wait(self, place: Shared, phase: Any, pred: Any = True) -> None:
        """Until the phase of this parity has ended."""
        if not bool(pred):
            return
        mbarrier, parity = self.mbarrier(place), int(phase)

        def ended() -> bool:
            if mbarrier.phase % 2 == parity:
                mbarrier.land()
            return mbarrier.phase % 2 != parity

        assert self.partitions is not None
        self.partitions.wait(ended)
        self.actor.clock = torch.maximum(self.actor.clock, mbarrier.clock)

    def specialise(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        self.seed += 1
        partitions = Partitions.__new__(Partitions)
        self.partitions = partitions
        partitions.__init__(self, [lambda f=f, a=a: f(*a) for f, a in functions], self.seed)


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return Pointer(a.memory, torch.where(torch.as_tensor(condition), a.address, b.address), a.element)
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block)


class Constant(float):
    @property
    def value(self) -> float:
        return self


class WholeConstant(int):
    @property
    def value(self) -> int:
        return self


def constexpr(value: Any) -> Any:
    if isinstance(value, int):
        return WholeConstant(value)
    return Constant(value) if isinstance(value, float) else SimpleNamespace(value=value)


def _layout(*_: Any) -> None:
    return None


def _language(device: Device) -> SimpleNamespace:
    return SimpleNamespace(
        constexpr=constexpr, uint8=torch.uint8, int16=torch.int16, int32=torch.int32, int64=torch.int64,
        bfloat16=torch.bfloat16, float32=torch.float32,
        NVMMASharedLayout=_layout, NVMMADistributedLayout=_layout, BlockedLayout=_layout, SliceLayout=_layout,
        DistributedLinearLayout=_layout, SwizzledSharedLayout=_layout, DotOperandLayout=_layout,
        program_id=lambda axis: block(device.program[axis], torch.int32),
        num_programs=lambda axis: block(device.programs[axis], torch.int32),
        cdiv=lambda a, b: (a + b - 1) // b,
        arange=lambda start, end, layout=None: block(torch.arange(start, end, dtype=torch.int32)),
        full=lambda shape, value, dtype, layout=None: block(torch.full(shape, value, dtype=dtype)),
        zeros=lambda shape, dtype, layout=None: block(torch.zeros(shape, dtype=dtype)),
        load=device.memory.load, store=device.memory.store, where=where,
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block),
        max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
        abs=torch.abs, exp=torch.exp, exp2=torch.exp2, log=torch.log, log2=torch.log2,
        join=lambda a, b: torch.stack([a, b], dim=-1), split=lambda x: x.unbind(-1),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        allocate_shared_memory=device.allocate, barrier=device.barrier, static_range=range,
        warp_specialize=device.specialise,
        # A prefetch, which does nothing but must point into its tensor.
        inline_asm_elementwise=lambda _code, _constraints, arguments, **_: device.memory.load(arguments[0]),
    )  # fmt: skip


def landed(_outstanding: int, deps: list[Any]) -> Any:
    """The products among deps, and the blocks as they are; a single one alone."""
    results = [x.landed() if isinstance(x, Flying) else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def jit(function: Any = None, **_: Any) -> Any:
    return (lambda function: function) if function is None else function


def numbers(*bounds: Any) -> Any:
    """`range` of a kernel: its numbers are scalars of the device."""
    return (block(number, torch.int32) for number in range(*(int(bound) for bound in bounds)))


class Kernels:
    """The functions of Gluon files, to be launched with `run`. A later file may use the names of an earlier one."""

    def __init__(self, *files: Path):
        self.device = device = Device()
        self.names: dict[str, Any] = {
            "__name__": "interpreted",
            "range": numbers,
            "gluon": SimpleNamespace(jit=jit, constexpr_function=jit),
            "gl": _language(device),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=device.copy,
                commit_group=device.commit,
                wait_group=device.wait_copies,
                mbarrier_arrive=device.arrive_with_copies,
            ),
            "mbarrier": SimpleNamespace(
                init=device.begin_mbarrier, arrive=device.arrive, wait=device.wait, MBarrierLayout=_layout
            ),
            "fence_async_shared": device.fence,
            "warpgroup_mma": device.product,
            "warpgroup_mma_init": lambda start: start,
            "warpgroup_mma_wait": landed,
        }
        for file in files:
            source = file.read_text()
            first, last = (
                source.index("from triton"),
                max(source.rindex("\nfrom triton"), source.rfind("\nfrom leadline")),
            )
            line = source[last + 1 :].split("\n", 1)[0]
            end = source.index(")\n", last) + 2 if line.endswith("(") else source.index("\n", last + 1) + 1
            blank = "\n" * source[first:end].count("\n")  # keeps the numbers of the lines
            exec(compile(source[:first] + blank + source[end:], str(file), "exec"), self.names)

    def run(self, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel: tensors become pointers, numbers stay, None means an operand that is not there."""
        self.device.memory.tensors.clear()
        values = [self.device.memory.pointer(x) if isinstance(x, Tensor) else x for x in arguments]
        self.device.programs = (*grid, 1, 1)[:3]
        for program in itertools.product(*(range(number) for number in self.device.programs)):
            self.device.begin(program)
            self.names[name](*values, **constants)
