"""Accounting: parameters, FLOPs for one decoded token, cache bytes and training memory, as closed forms.

Nothing here builds a tensor. Every term is one small function with its formula, in the shape letters of `ModelConfig`.
A test compares the parameter terms with the tensors of real modules, and the totals with the published numbers.

The published efficiency figures at one million tokens (report 1: Pro 27% of V3.2's FLOPs and 10% of its cache, Flash
10% and 7%) come without a formula. One counting rule reproduces all four, and it is the rule used here:

- a multiply-add is 2 FLOPs; norms, softmax, rotations and other element-wise work are not counted;
- products are counted in *equivalent FP8 FLOPs*: FP8 x FP8 and FP8 x FP4 as they are, BF16 twice, FP4 x FP4 half;
- a tensor counts in the format it is stored in; attention's core, which reads BF16, counts as BF16;
- a cache entry counts with its scales; window, compressed entries and index keys count, the fixed tail does not.

DeepSeek-V3.2, the reference of those figures, is counted by the same rule in `model/v32.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from leadline.model.config import CSA_RATIO, HCA_RATIO, ModelConfig

BF16_BYTES, FP32_BYTES = 2, 4
FP8_WEIGHT, BF16_WEIGHT, FP4_WEIGHT = 1.0, 2.0, 0.5  # cost of one FLOP in equivalent FP8 FLOPs
FP8_CACHE_BLOCK = 64  # values of a cache entry that share one scale byte
FP4_INDEX_BLOCK = 32  # values of an index key that share one scale byte
SCALE_BYTES_ALIGNMENT = 8


# -- parameters --------------------------------------------------------------------------------------------------


def embedding_parameters(c: ModelConfig) -> int:
    """The token table, and as many again in the head: V D."""
    return c.vocab_size * c.hidden_size


def attention_matrices(c: ModelConfig) -> int:
    """The five projections of one layer (report 2.3): D Q + Q H K + D K + H K L + O L D."""
    heads_width = c.num_attention_heads * c.head_dim
    query = c.hidden_size * c.q_lora_rank + c.q_lora_rank * heads_width
    output = heads_width * c.o_lora_rank + c.o_groups * c.o_lora_rank * c.hidden_size
    return query + c.hidden_size * c.head_dim + output


def attention_vectors(c: ModelConfig) -> int:
    """Query norm, key norm and sinks of one layer: Q + K + H."""
    return c.q_lora_rank + c.head_dim + c.num_attention_heads


def compressor_halves(ratio: int) -> int:
    """2 for CSA, whose entries overlap their predecessor, 1 for HCA (report 2.3.1)."""
    return 2 if ratio == CSA_RATIO else 1


def compressor_matrices(c: ModelConfig, ratio: int, width: int) -> int:
    """Value and gate projections of one compressor: 2 D (halves width); width is K, or I inside the indexer."""
    return 2 * c.hidden_size * compressor_halves(ratio) * width


def compressor_vectors(ratio: int, width: int) -> int:
    """Positional bias and norm of one compressor: ratio halves width + width."""
    return ratio * compressor_halves(ratio) * width + width


def indexer_query_matrix(c: ModelConfig) -> int:
    """Query projection of one indexer (report 2.3.1): Q J I."""
    return c.q_lora_rank * c.index_n_heads * c.index_head_dim


def indexer_head_weights(c: ModelConfig) -> int:
    """Projection to one weight per indexer head: D J."""
    return c.hidden_size * c.index_n_heads


def hyper_connection_mixes(c: ModelConfig) -> int:
    """Numbers that one hyper-connection makes for each token (report 2.2): S to mix in, S to mix out, S^2 between."""
    return 2 * c.hc_mult + c.hc_mult**2


def hyper_connection_matrix(c: ModelConfig) -> int:
    """One sublayer's mixing projection: (2S + S^2) S D."""
    return hyper_connection_mixes(c) * c.hc_mult * c.hidden_size


def hyper_connection_vectors(c: ModelConfig) -> int:
    """One sublayer's static biases and its three gating scales: (2S + S^2) + 3."""
    return hyper_connection_mixes(c) + 3


def stream_head_matrix(c: ModelConfig) -> int:
    """The projection that mixes the streams into one before the head: S S D."""
    return c.hc_mult**2 * c.hidden_size


def stream_head_vectors(c: ModelConfig) -> int:
    """Its static biases and its scale: S + 1."""
    return c.hc_mult + 1


def router_matrix(c: ModelConfig) -> int:
    """One layer's expert scores (report 2.1): E D."""
    return c.n_routed_experts * c.hidden_size


def selection_bias(c: ModelConfig) -> int:
    """One score-routed layer's selection bias, moved by load and not by gradients: E."""
    return c.n_routed_experts


def expert_matrices(c: ModelConfig) -> int:
    """One expert's gate, up and down projections: 3 D F."""
    return 3 * c.hidden_size * c.moe_intermediate_size


def block_norms(c: ModelConfig) -> int:
    """The norms before attention and before the experts: 2 D."""
    return 2 * c.hidden_size


def num_layers_of(c: ModelConfig, ratio: int) -> int:
    """Trunk layers with this compression ratio."""
    return c.layer_ratios.count(ratio)


def num_score_layers(c: ModelConfig) -> int:
    """Trunk layers that route by score; the others route by token id and have no selection bias."""
    return c.num_hidden_layers - min(c.num_hash_layers, c.num_hidden_layers)


def parameter_breakdown(c: ModelConfig) -> dict[str, int]:
    """Floating-point numbers of the trunk by part, MTP blocks left out; the sum is `parameters_total`.

    The hash table `tid2eid` holds expert numbers and is not counted; the selection bias is, since it is stored in FP32.
    """
    layers, csa, hca = c.num_hidden_layers, num_layers_of(c, CSA_RATIO), num_layers_of(c, HCA_RATIO)
    compressor = {
        r: compressor_matrices(c, r, c.head_dim) + compressor_vectors(r, c.head_dim) for r in (CSA_RATIO, HCA_RATIO)
    }
    index_keys = compressor_matrices(c, CSA_RATIO, c.index_head_dim) + compressor_vectors(CSA_RATIO, c.index_head_dim)
    hyper_connection = hyper_connection_matrix(c) + hyper_connection_vectors(c)
    return {
        "embedding": embedding_parameters(c),
        "head": embedding_parameters(c),
        "attention": layers * (attention_matrices(c) + attention_vectors(c)),
        "compressors": csa * compressor[CSA_RATIO] + hca * compressor[HCA_RATIO],
        "indexers": csa * (indexer_query_matrix(c) + indexer_head_weights(c) + index_keys),
        "hyper_connections": 2 * layers * hyper_connection + stream_head_matrix(c) + stream_head_vectors(c),
        "router": layers * router_matrix(c) + num_score_layers(c) * selection_bias(c),
        "shared_experts": layers * c.n_shared_experts * expert_matrices(c),
        "routed_experts": layers * c.n_routed_experts * expert_matrices(c),
        "norms": layers * block_norms(c) + c.hidden_size,
    }


def parameters_total(c: ModelConfig) -> int:
    """All floating-point numbers of the trunk, embedding and head included, MTP blocks left out."""
    return sum(parameter_breakdown(c).values())


def parameters_active(c: ModelConfig, with_embedding: bool = False) -> int:
    """Numbers that one token touches: the total, less E - A experts in every layer, and less the embedding table.

    A token reads a single row of the table; published counts leave it out or in, and so does `with_embedding`.
    """
    idle_experts = c.num_hidden_layers * (c.n_routed_experts - c.num_experts_per_tok) * expert_matrices(c)
    return parameters_total(c) - idle_experts - (0 if with_embedding else embedding_parameters(c))


def parameters_mtp_block(c: ModelConfig) -> int:
    """One MTP block (report 2.1): a window-only, score-routed block, two D x D maps, three norms, a stream head."""
    attention = attention_matrices(c) + attention_vectors(c)
    experts = (c.n_shared_experts + c.n_routed_experts) * expert_matrices(c) + router_matrix(c) + selection_bias(c)
    streams = 2 * (hyper_connection_matrix(c) + hyper_connection_vectors(c))
    own_head = stream_head_matrix(c) + stream_head_vectors(c)
    joining = 2 * c.hidden_size**2 + 3 * c.hidden_size
    return attention + experts + streams + block_norms(c) + own_head + joining


# -- FLOPs of one decoded token ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeFlops:
    """FLOPs of one decoded token by the format they run in, before weighting."""

    fp8_linears: int
    fp4_experts: int
    bf16_linears: int
    core_attention: int
    index_scores: int
    index_weight: float  # equivalent FP8 FLOPs of one index FLOP: FP4 x FP4 in V4, FP8 in V3.2

    @property
    def equivalent_fp8(self) -> float:
        """The published unit: FP8 and FP4 weights x1, BF16 x2, index scores by their own format."""
        fp8 = FP8_WEIGHT * (self.fp8_linears + self.fp4_experts)
        return fp8 + BF16_WEIGHT * (self.bf16_linears + self.core_attention) + self.index_weight * self.index_scores


def fp8_linear_flops(c: ModelConfig) -> int:
    """Attention projections, indexer queries and shared experts: 2 (matrices)."""
    every_layer = attention_matrices(c) + c.n_shared_experts * expert_matrices(c)
    return 2 * (c.num_hidden_layers * every_layer + num_layers_of(c, CSA_RATIO) * indexer_query_matrix(c))


def fp4_expert_flops(c: ModelConfig) -> int:
    """The A chosen experts of every layer: 2 layers A 3 D F. FP4 weights meet FP8 activations at FP8's rate."""
    return 2 * c.num_hidden_layers * c.num_experts_per_tok * expert_matrices(c)


def bf16_linear_flops(c: ModelConfig) -> int:
    """Compressors, indexer head weights, hyper-connections, router and head: 2 (matrices)."""
    csa_layer = (
        compressor_matrices(c, CSA_RATIO, c.head_dim)
        + compressor_matrices(c, CSA_RATIO, c.index_head_dim)
        + indexer_head_weights(c)
    )
    hca_layer = compressor_matrices(c, HCA_RATIO, c.head_dim)
    every_layer = 2 * hyper_connection_matrix(c) + router_matrix(c)
    ends = stream_head_matrix(c) + embedding_parameters(c)
    compressing = num_layers_of(c, CSA_RATIO) * csa_layer + num_layers_of(c, HCA_RATIO) * hca_layer
    return 2 * (compressing + c.num_hidden_layers * every_layer + ends)


def window_entries(c: ModelConfig, context: int) -> int:
    """Tokens that the window shows to the last of `context` tokens: min(W, n)."""
    return min(c.sliding_window, context)


def attended_entries(c: ModelConfig, ratio: int, context: int) -> int:
    """Window and compressed entries in one layer's softmax: W, plus min(M, n / 4) in CSA or n / 128 in HCA."""
    if ratio == 0:
        return window_entries(c, context)
    visible = context // ratio
    return window_entries(c, context) + (min(c.index_topk, visible) if ratio == CSA_RATIO else visible)


def core_attention_flops(c: ModelConfig, context: int) -> int:
    """Scores and weighted sum over the attended entries: 4 H K entries, summed over layers (report 2.3)."""
    entries = sum(attended_entries(c, ratio, context) for ratio in c.layer_ratios)
    return 4 * c.num_attention_heads * c.head_dim * entries


def index_score_flops(c: ModelConfig, context: int) -> int:
    """The indexer's scores against all n / 4 index keys of every CSA layer: 2 J I n / 4."""
    per_key = 2 * c.index_n_heads * c.index_head_dim
    return num_layers_of(c, CSA_RATIO) * per_key * (context // CSA_RATIO)


def decode_flops(c: ModelConfig, context: int) -> DecodeFlops:
    """FLOPs of decoding one token that sees `context` tokens, itself included."""
    return DecodeFlops(
        fp8_linears=fp8_linear_flops(c),
        fp4_experts=fp4_expert_flops(c),
        bf16_linears=bf16_linear_flops(c),
        core_attention=core_attention_flops(c, context),
        index_scores=index_score_flops(c, context),
        index_weight=FP4_WEIGHT,
    )


# -- cache bytes -------------------------------------------------------------------------------------------------


def _ceil_div(amount: int, unit: int) -> int:
    return -(-amount // unit)


def entry_bytes(c: ModelConfig) -> int:
    """One window token or compressed entry: (K - R) FP8 + 2 R BF16 + scales.

    There is one scale byte for every 64 FP8 values, and their number is rounded up to a multiple of 8: 448 + 128 + 8 =
    584 bytes for the released models.
    """
    fp8_values = c.head_dim - c.qk_rope_head_dim
    scales = _ceil_div(_ceil_div(fp8_values, FP8_CACHE_BLOCK), SCALE_BYTES_ALIGNMENT) * SCALE_BYTES_ALIGNMENT
    return fp8_values + BF16_BYTES * c.qk_rope_head_dim + scales


def index_key_bytes(c: ModelConfig) -> int:
    """One index key: I / 2 bytes of FP4 and a scale byte for every 32 values; 64 + 4 = 68 in the released models."""
    return _ceil_div(c.index_head_dim, 2) + _ceil_div(c.index_head_dim, FP4_INDEX_BLOCK)


def kv_cache_breakdown(c: ModelConfig, context: int, entry: int, index_key: int) -> dict[str, int]:
    """Bytes of one sequence's cache by kind, for given bytes per entry and per index key.

    csa (n / 4) entry, index keys (n / 4) index_key, hca (n / 128) entry, window min(W, n) entry, each times its layers.
    """
    csa, hca = num_layers_of(c, CSA_RATIO), num_layers_of(c, HCA_RATIO)
    return {
        "csa_entries": csa * (context // CSA_RATIO) * entry,
        "index_keys": csa * (context // CSA_RATIO) * index_key,
        "hca_entries": hca * (context // HCA_RATIO) * entry,
        "window": c.num_hidden_layers * window_entries(c, context) * entry,
    }


def kv_cache_bytes(c: ModelConfig, context: int) -> int:
    """One sequence's cache after `context` tokens, in the served formats (FP8 entries, FP4 index keys)."""
    return sum(kv_cache_breakdown(c, context, entry_bytes(c), index_key_bytes(c)).values())


def kv_cache_bytes_bf16(c: ModelConfig, context: int) -> int:
    """The same cache with every number in BF16: 2 K per entry and 2 I per index key."""
    return sum(kv_cache_breakdown(c, context, BF16_BYTES * c.head_dim, BF16_BYTES * c.index_head_dim).values())


def tail_bytes(c: ModelConfig) -> int:
    """One sequence's uncompressed tails in FP32, whatever its length: values and gate scores of halves x ratio tokens.

    2 x 4 bytes x (halves ratio) x (halves width) for every compressor (report 3.5). The window covers these tokens too,
    so published cache figures leave the tails out.
    """

    def tail(ratio: int, width: int) -> int:
        return 2 * FP32_BYTES * compressor_halves(ratio) * ratio * compressor_halves(ratio) * width

    csa = tail(CSA_RATIO, c.head_dim) + tail(CSA_RATIO, c.index_head_dim)
    return num_layers_of(c, CSA_RATIO) * csa + num_layers_of(c, HCA_RATIO) * tail(HCA_RATIO, c.head_dim)


def page_bytes(c: ModelConfig, entry: int, index_key: int) -> int:
    """What all layers keep of 128 tokens: 32 entries and index keys of each CSA layer, one entry of each HCA layer."""
    whole = kv_cache_breakdown(c, HCA_RATIO, entry, index_key)
    return whole["csa_entries"] + whole["index_keys"] + whole["hca_entries"]


def slot_bytes(c: ModelConfig, entry: int) -> int:
    """What all layers, MTP blocks included, keep of a sequence whatever its length: W entries each, and the tails."""
    return (c.num_hidden_layers + len(c.mtp_ratios)) * c.sliding_window * entry + tail_bytes(c)


# -- training memory ---------------------------------------------------------------------------------------------


def adamw_parameters(c: ModelConfig) -> int:
    """Numbers trained by AdamW, MTP blocks included (report 2.4): embedding, head, and every vector.

    Vectors are the norms, sinks, positional biases, and the biases and scales of the hyper-connections.
    """
    csa, hca, mtp = num_layers_of(c, CSA_RATIO), num_layers_of(c, HCA_RATIO), c.num_nextn_predict_layers
    every_block = attention_vectors(c) + block_norms(c) + 2 * hyper_connection_vectors(c)
    csa_layer = compressor_vectors(CSA_RATIO, c.head_dim) + compressor_vectors(CSA_RATIO, c.index_head_dim)
    compressors = csa * csa_layer + hca * compressor_vectors(HCA_RATIO, c.head_dim)
    ends = c.hidden_size + stream_head_vectors(c) + mtp * (3 * c.hidden_size + stream_head_vectors(c))
    return 2 * embedding_parameters(c) + (c.num_hidden_layers + mtp) * every_block + compressors + ends


def trained_parameters(c: ModelConfig) -> int:
    """Numbers that receive gradients: trunk and MTP blocks, less the selection biases."""
    mtp = c.num_nextn_predict_layers
    everything = parameters_total(c) + mtp * parameters_mtp_block(c)
    return everything - (num_score_layers(c) + mtp) * selection_bias(c)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds whatever the batch, on one device, with everything in FP32.

    Activations are not in it. With every block recomputed in the backward pass a token keeps
    `stream_bytes_per_token`; the working set of one block and the logits come on top and depend on the tile sizes.
    """

    weights: int
    gradients: int
    muon_momentum: int
    adamw_moments: int
    stream_bytes_per_token: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.muon_momentum + self.adamw_moments


def training_memory(c: ModelConfig) -> TrainingMemory:
    """4 bytes for each weight, gradient and Muon momentum, 8 for the two moments of AdamW; MTP blocks included.

    The S streams entering each block take 4 S D bytes per token and block.
    """
    trained, adamw = trained_parameters(c), adamw_parameters(c)
    blocks = c.num_hidden_layers + c.num_nextn_predict_layers
    return TrainingMemory(
        weights=FP32_BYTES * trained,
        gradients=FP32_BYTES * trained,
        muon_momentum=FP32_BYTES * (trained - adamw),
        adamw_moments=2 * FP32_BYTES * adamw,
        stream_bytes_per_token=FP32_BYTES * blocks * c.hc_mult * c.hidden_size,
    )
