"""Work beside other work, where a step is captured as a graph.

Most kernels of a step wait for memory or for one another and leave most of a card idle, and many do not depend on each
other: the shared expert and the router, the queries, and what is stored of a token. In a graph they may run at once.

    shared = Beside(lambda: shared_expert(x), x)        begins; what it reads must not be changed until its end
    routed = ...
    routed + shared.result()                            waits

Outside of a capture, everything happens in the order in which it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Beside(Generic[Result]):
    """Work on the device of x that has begun. Of the same lane, one begins after the other.

    Tensors that the work has made stay its stream's when they are freed, so they are used again by work which begins
    after everything that was launched before. The work itself is held, and with it the tensors that it reads.
    """

    def __init__(self, work: Callable[[], Result], x: Tensor, lane: int = 0):
        self._work, self._side = work, None
        if not torch.compiler.is_compiling() and x.is_cuda and torch.cuda.is_current_stream_capturing():
            self._side = _stream(x.device, lane)
        if self._side is None:
            self._result = work()
            return
        self._side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._side):
            self._result = work()

    def result(self) -> Result:
        """What the work returned, for whatever is launched from now on."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        return self._result


@cache
def _stream(device: torch.device, lane: int) -> torch.cuda.Stream:
    """Lanes have streams of their own."""
    return torch.cuda.Stream(device)
