"""What `leadline bench ops` measures: each op at the width of V4-Flash, its gate, and what it must cost at least."""

from __future__ import annotations

from leadline.recipes.bench_ops import (
    attention,
    cache_step,
    decode,
    experts,
    gated_pool,
    hyper_connection,
    indexer,
    norm_rope,
    optimizer,
    pointwise,
    products,
    quantized,
    steps,
)
from leadline.recipes.bench_ops.case import Case

CASES: tuple[Case, ...] = (
    *attention.CASES,
    *indexer.CASES,
    *decode.CASES,
    *cache_step.CASES,
    *pointwise.CASES,
    *norm_rope.CASES,
    *hyper_connection.CASES,
    *gated_pool.CASES,
    *products.CASES,
    *quantized.CASES,
    *experts.CASES,
    *steps.CASES,
    *optimizer.CASES,
)
