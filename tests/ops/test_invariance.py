"""Inside of `batch_invariant` a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from leadline.ops.invariance import batch_invariant, is_batch_invariant, rows_times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_of_a_product_has_the_same_bits_among_any_number(dtype: torch.dtype) -> None:
    x_TN, weight_ON = torch.randn(70, 96).to(dtype), torch.randn(40, 96).to(dtype)
    with batch_invariant():
        whole = rows_times(x_TN, weight_ON)
        for start, stop in ((0, 1), (0, 3), (5, 6), (15, 17), (1, 70), (33, 66)):
            assert torch.equal(rows_times(x_TN[start:stop], weight_ON), whole[start:stop])
        assert rows_times(x_TN[:0], weight_ON).shape == (0, 40)
    torch.testing.assert_close(whole, x_TN @ weight_ON.T)


def test_the_mode_ends_with_its_block() -> None:
    def fail() -> None:
        with batch_invariant():
            assert is_batch_invariant()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not is_batch_invariant()
