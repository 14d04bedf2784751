"""DeepSeek-V3.2, the reference of the efficiency figures, counted by the rule of `model/accounting.py`.

Shape from the published `config_671B_v3.2.json`. Its attention is one latent per token (MLA), which is absorbed into
queries and outputs in decoding, and an indexer that picks 2,048 tokens; it runs in FP8, so an index FLOP counts once.
"""

from __future__ import annotations

from leadline.model.accounting import BF16_BYTES, FP8_WEIGHT, FP32_BYTES, DecodeFlops

VOCAB_SIZE = 129280
HIDDEN_SIZE = 7168
NUM_LAYERS = 61
NUM_DENSE_LAYERS = 3
INTERMEDIATE_SIZE = 18432
MOE_INTERMEDIATE_SIZE = 2048
N_ROUTED_EXPERTS = 256
N_SHARED_EXPERTS = 1
NUM_EXPERTS_PER_TOK = 8
NUM_ATTENTION_HEADS = 128
Q_LORA_RANK = 1536
KV_LORA_RANK = 512
QK_NOPE_HEAD_DIM = 128
QK_ROPE_HEAD_DIM = 64
V_HEAD_DIM = 128
INDEX_N_HEADS = 64
INDEX_HEAD_DIM = 128
INDEX_TOPK = 2048
LATENT_SCALE_BLOCK = 128  # FP8 values of a cached latent that share one FP32 scale


def attention_matrices() -> int:
    """One layer's query down and up, latent down and up, and output; absorbing does not change the count."""
    query = HIDDEN_SIZE * Q_LORA_RANK + Q_LORA_RANK * NUM_ATTENTION_HEADS * (QK_NOPE_HEAD_DIM + QK_ROPE_HEAD_DIM)
    latent_down = HIDDEN_SIZE * (KV_LORA_RANK + QK_ROPE_HEAD_DIM)
    latent_up = KV_LORA_RANK * NUM_ATTENTION_HEADS * (QK_NOPE_HEAD_DIM + V_HEAD_DIM)
    return query + latent_down + latent_up + NUM_ATTENTION_HEADS * V_HEAD_DIM * HIDDEN_SIZE


def indexer_matrices() -> int:
    """One layer's index query and index key projections, in FP8: Q J I + D I."""
    return Q_LORA_RANK * INDEX_N_HEADS * INDEX_HEAD_DIM + HIDDEN_SIZE * INDEX_HEAD_DIM


def feed_forward_matrices(experts_per_layer: int) -> int:
    """So many experts in each MoE layer, and the wide feed-forward of the dense layers: 3 D F each."""
    moe = (NUM_LAYERS - NUM_DENSE_LAYERS) * experts_per_layer * 3 * HIDDEN_SIZE * MOE_INTERMEDIATE_SIZE
    return moe + NUM_DENSE_LAYERS * 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE


def fp8_matrices(experts_per_layer: int) -> int:
    """Everything stored in FP8."""
    return NUM_LAYERS * (attention_matrices() + indexer_matrices()) + feed_forward_matrices(experts_per_layer)


def bf16_matrices() -> int:
    """Indexer head weights, routers and head."""
    head_weights = NUM_LAYERS * HIDDEN_SIZE * INDEX_N_HEADS
    router = (NUM_LAYERS - NUM_DENSE_LAYERS) * HIDDEN_SIZE * N_ROUTED_EXPERTS
    return head_weights + router + VOCAB_SIZE * HIDDEN_SIZE


def parameters_total() -> int:
    """All matrices, embedding included, MTP left out; the vectors, about a millionth of the total, are not counted."""
    return fp8_matrices(N_ROUTED_EXPERTS + N_SHARED_EXPERTS) + bf16_matrices() + VOCAB_SIZE * HIDDEN_SIZE


def parameters_active() -> int:
    """Matrices that one token touches, without the embedding table."""
    return fp8_matrices(NUM_EXPERTS_PER_TOK + N_SHARED_EXPERTS) + bf16_matrices()


def decode_flops(context: int) -> DecodeFlops:
    """One decoded token: absorbed attention over min(2048, n) picked tokens, index scores over all n.

    Core attention is 2 H (latent + R + latent) per picked token, an index score 2 J I per token.
    """
    core = 2 * NUM_ATTENTION_HEADS * (KV_LORA_RANK + QK_ROPE_HEAD_DIM + KV_LORA_RANK) * min(INDEX_TOPK, context)
    return DecodeFlops(
        fp8_linears=2 * fp8_matrices(NUM_EXPERTS_PER_TOK + N_SHARED_EXPERTS),
        fp4_experts=0,
        bf16_linears=2 * bf16_matrices(),
        core_attention=NUM_LAYERS * core,
        index_scores=NUM_LAYERS * 2 * INDEX_N_HEADS * INDEX_HEAD_DIM * context,
        index_weight=FP8_WEIGHT,
    )


def kv_cache_bytes(context: int) -> int:
    """Per token and layer: 512 FP8 + 4 FP32 scales + 64 BF16 = 656, and an index key of 128 FP8 + 1 scale = 132."""
    latent = KV_LORA_RANK + FP32_BYTES * (KV_LORA_RANK // LATENT_SCALE_BLOCK) + BF16_BYTES * QK_ROPE_HEAD_DIM
    return NUM_LAYERS * context * (latent + INDEX_HEAD_DIM + FP32_BYTES)


def kv_cache_bytes_bf16(context: int) -> int:
    """The same cache with every number in BF16."""
    return NUM_LAYERS * context * BF16_BYTES * (KV_LORA_RANK + QK_ROPE_HEAD_DIM + INDEX_HEAD_DIM)
