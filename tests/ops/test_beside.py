"""Work beside other work: in order where nothing is captured, and the same results in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.ops.beside import Beside


def test_outside_of_a_capture_work_happens_where_it_is_written() -> None:
    done = []
    x = torch.zeros(1)
    first = Beside(lambda: done.append("first") or x + 1, x)
    done.append("second")
    third = Beside(lambda: done.append("third") or x + 3, x, lane=1)
    assert done == ["first", "second", "third"]
    assert (first.result(), third.result(), first.result()) == (1, 3, 1)


def test_what_fails_inside_fails_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        Beside(lambda: 1 // 0, torch.zeros(1))


@pytest.mark.gpu
def test_a_graph_gives_what_eager_gives() -> None:
    """Layers of three branches whose temporary tensors are freed and used again, replayed several times."""
    weights = [torch.randn(3, 512, 512, device="cuda") / 512**0.5 for _ in range(6)]

    def chain(x: Tensor, w: Tensor, count: int) -> Tensor:
        for _ in range(count):
            x = torch.tanh(x @ w)
        return x

    def network(x: Tensor) -> Tensor:
        for first, second, third in weights:
            one = Beside(lambda x=x, w=first: chain(x, w, 5), x)
            two = Beside(lambda x=x, w=second: chain(x, w, 2), x, lane=1)
            x = chain(x, third, 3) + one.result() * two.result()
        return x

    x = torch.randn(64, 512, device="cuda")
    wanted = network(x)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        network(x)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = network(x)
    for _ in range(5):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, wanted)
