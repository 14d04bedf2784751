"""How torch.compile sees the launch of a kernel: as one operation, of which only the shape of the result is known.

A kernel's launches are Python that a compiler need not understand: grids, strides, warps. Decorated with `opaque`, a
function of tensors becomes the operation `leadline::<op>_<function>` while torch traces. Outside of that nothing
changes: the function is called as it stands, without the few microseconds that torch's dispatcher would add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def opaque(
    fake: Callable[..., Any],
    changes: tuple[str, ...] = (),
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorator for a function of positional tensors and numbers that returns new tensors: one, or a tuple or list.

    fake: takes the same arguments and returns tensors with the shapes, dtypes, strides and devices of the results; what
    they hold is never looked at. changes: names of the arguments that the function writes into; such a function returns
    nothing. It must be annotated, must not change other arguments, must not return one of them or a view of one, and
    must not ask the device for a number.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        folder = function.__module__.split(".")[-2]
        operation = torch.library.custom_op(f"leadline::{folder}_{function.__name__}", function, mutates_args=changes)
        operation.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
            chosen = operation if torch.compiler.is_compiling() else function
            return chosen(*arguments, **named)

        return call

    return decorate
