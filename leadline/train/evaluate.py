"""Held-out text in bits per byte: a number that does not depend on the tokenizer."""

from __future__ import annotations

import math

import torch

from leadline.data.loader import single_pass
from leadline.data.shards import Shards
from leadline.model.transformer import Transformer
from leadline.ops.cross_entropy import cross_entropy
from leadline.text.tokenizer import Tokenizer


@torch.no_grad()
def bits_per_byte(
    model: Transformer, heldout: Shards, tokenizer: Tokenizer, tokens_per_segment: int, *, limit: int | None
) -> float:
    """Sum of the next-token loss in bits over the UTF-8 bytes of the text that was predicted.

    Documents are scored one beside the other in segments, each from its own beginning, with the attention that serves
    (sparse). limit: stop after about so many tokens; None = all.
    """
    nats, num_bytes, tokens = 0.0, 0, 0
    for batch in single_pass(heldout, tokenizer, tokens_per_segment):
        output = model(batch.segment)
        nll_T = cross_entropy(model.hidden(output.streams_TSD), model.head.weight, batch.targets_T)
        nats += float(nll_T.double().sum())
        num_bytes += batch.num_bytes
        tokens += batch.segment.num_tokens
        if limit is not None and tokens >= limit:
            break
    return nats / math.log(2) / max(num_bytes, 1)
