"""The attention layer of DeepSeek-V3.2 for decoding: multi-head latent attention to the tokens that an indexer picks.

A token leaves one latent c of K values, which all heads share, R rotary values, and an index key. In decoding the maps
from the latent to each head's keys and values are absorbed into query and output, so that the latent itself is key and
value of every head:

    q_lat = norm(x W_qa),  q_h = q_lat W_qb  with P plain and R rotary values
    c = norm(x W_kv),  r = rope(x W_kv's last R values)
    score(t, s) = sum_j w_tj ReLU(q_tj . k_s),  picks = the M tokens of largest score
    o_h = softmax over the picked of ((q_h,plain U_h) . c_s + q_h,rotary . r_s) / sqrt(P + R)   times   c_s
    out = concat_h(o_h V_h) W_o

Formats are the served ones: c in E4M3 with an FP32 scale for each 128 values, r in bfloat16, 656 bytes a token; index
keys in E4M3 with one FP32 scale, 132 bytes; linear maps in FP8 but U and V, which are multiplied in bfloat16. Three
simplifications move no byte that is counted and can only help this layer: a sequence's tokens lie one behind the other,
so nothing goes through a page table; scales are powers of two; the rotation has no YaRN, and turns the last values of
an index key where V3.2 turns the first.

Letters that are not DESIGN.md's: K is the width of the latent, P and U the widths of a head's plain query and of its
values, X = P + R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leadline.formats import fp8, hadamard
from leadline.model import v32
from leadline.model.linear import Linear, Norm
from leadline.ops.dispatch import use_kernel
from leadline.ops.lightning_indexer.reference import index_scores
from leadline.ops.precision import wide
from leadline.ops.quantized_linear import quantize
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import frequencies, rope, rotations
from leadline.ops.select_topk import select_topk

EPS = 1e-6
ROPE_THETA = 10000.0
CAPACITY_UNIT = 256  # a sequence's rows are a multiple of it, so that the kernels need no masks for keys
PAGE_KEYS = 32


@dataclass(frozen=True)
class Shape:
    """The published numbers, under their published names."""

    hidden_size: int = v32.HIDDEN_SIZE
    num_attention_heads: int = v32.NUM_ATTENTION_HEADS
    q_lora_rank: int = v32.Q_LORA_RANK
    kv_lora_rank: int = v32.KV_LORA_RANK
    qk_nope_head_dim: int = v32.QK_NOPE_HEAD_DIM
    qk_rope_head_dim: int = v32.QK_ROPE_HEAD_DIM
    v_head_dim: int = v32.V_HEAD_DIM
    index_n_heads: int = v32.INDEX_N_HEADS
    index_head_dim: int = v32.INDEX_HEAD_DIM
    index_topk: int = v32.INDEX_TOPK


class LatentCache:
    """What the layer keeps of some sequences of up to C tokens; token c of sequence n in row n C + c.

    codes uint8 [rows, K], scales FP32 [rows, K / 128], rotary bfloat16 [rows, R]; index_codes uint8 [rows, I],
    index_scales FP32 [rows, 1].
    """

    def __init__(self, shape: Shape, sequences: int, tokens: int, dtype: torch.dtype, device: torch.device):
        self.capacity = -(-tokens // CAPACITY_UNIT) * CAPACITY_UNIT
        rows = sequences * self.capacity
        blocks = -(-shape.kv_lora_rank // v32.LATENT_SCALE_BLOCK)
        self.codes = torch.zeros(rows, shape.kv_lora_rank, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(rows, blocks, device=device)
        self.rotary = torch.zeros(rows, shape.qk_rope_head_dim, dtype=dtype, device=device)
        self.index_codes = torch.zeros(rows, shape.index_head_dim, dtype=torch.uint8, device=device)
        self.index_scales = torch.zeros(rows, 1, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.rotary, self.index_codes, self.index_scales

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def fill(self) -> None:
        """Random contents: codes of numbers below 2, which leaves out NaN."""
        for codes in (self.codes, self.index_codes):
            codes.random_(0, 256).bitwise_and_(0xBF)
        self.rotary.normal_()
        self.scales.fill_(1.0)
        self.index_scales.fill_(1.0)


@dataclass(frozen=True)
class Step:
    """What all layers of one step share: one new token of each of T sequences.

    rows_T: where its latent goes. visible_T: how many tokens it sees, itself included. rotation: cos and sin.
    pages_NP, sequence_T: the rows of the cache, as `ops.decode_indexer` asks for them.
    """

    rotation: tuple[Tensor, Tensor]
    rows_T: Tensor
    visible_T: Tensor
    sequence_T: Tensor
    pages_NP: Tensor

    @classmethod
    def at(cls, positions_T: Tensor, shape: Shape, cache: LatentCache) -> Step:
        device, num_sequences = positions_T.device, len(positions_T)
        turning = frequencies(shape.qk_rope_head_dim, ROPE_THETA).to(device)
        sequence_T = torch.arange(num_sequences, device=device)
        pages = torch.arange(num_sequences * cache.capacity // PAGE_KEYS, dtype=torch.int32, device=device)
        return cls(
            rotations(positions_T, turning),
            sequence_T * cache.capacity + positions_T,
            positions_T + 1,
            sequence_T,
            pages.view(num_sequences, -1),
        )


class LatentAttention(nn.Module):
    """k_up [H, P, K] and v_up [H, K, U] are the absorbed maps U_h and V_h."""

    no_sink_H: Tensor
    signs_II: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, heads = shape, shape.num_attention_heads
        self.wq_a = Linear(shape.hidden_size, shape.q_lora_rank)
        self.q_norm = Norm(shape.q_lora_rank)
        self.wq_b = Linear(shape.q_lora_rank, heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim))
        self.wkv = Linear(shape.hidden_size, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_norm = Norm(shape.kv_lora_rank)
        self.k_up_HPK = nn.Parameter(torch.empty(heads, shape.qk_nope_head_dim, shape.kv_lora_rank))
        self.v_up_HKU = nn.Parameter(torch.empty(heads, shape.kv_lora_rank, shape.v_head_dim))
        self.wo = Linear(heads * shape.v_head_dim, shape.hidden_size)
        self.index_wq = Linear(shape.q_lora_rank, shape.index_n_heads * shape.index_head_dim)
        self.index_wk = Linear(shape.hidden_size, shape.index_head_dim)
        self.index_norm = nn.LayerNorm(shape.index_head_dim, EPS)
        self.index_weights = Linear(shape.hidden_size, shape.index_n_heads)
        self.register_buffer("no_sink_H", torch.full((heads,), float("-inf")), persistent=False)
        # Up to a factor, which the weights take.
        signs = hadamard.rotate(torch.eye(shape.index_head_dim)).sign()
        self.register_buffer("signs_II", signs, persistent=False)

    def forward(self, x_TD: Tensor, step: Step, cache: LatentCache) -> Tensor:
        """Output [T, D] of one new token of each sequence; the cache takes the tokens in."""
        plain = self.shape.qk_nope_head_dim
        q_latent_TQ = self.latent_query(x_TD)
        self.write(x_TD, step, cache)
        rows_TM = self.pick(x_TD, q_latent_TQ, step, cache)
        q_THX = self.queries(q_latent_TQ, step)
        q_HTK = torch.bmm(q_THX[..., :plain].transpose(0, 1), self.k_up_HPK)
        o_THK = self.attend(q_HTK, q_THX, rows_TM, cache)
        return self.project(torch.bmm(o_THK.transpose(0, 1), self.v_up_HKU))

    def latent_query(self, x_TD: Tensor) -> Tensor:
        return rms_norm(self.wq_a(x_TD), self.q_norm.weight, EPS)

    def queries(self, q_latent_TQ: Tensor, step: Step) -> Tensor:
        """[T, H, P + R], the last R values rotated."""
        return rope(self.wq_b(q_latent_TQ).unflatten(-1, (self.shape.num_attention_heads, -1)), *step.rotation)

    def project(self, o_HTU: Tensor) -> Tensor:
        return self.wo(o_HTU.transpose(0, 1).flatten(1))

    def new_tokens(self, x_TD: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [T, K], rotary parts [T, R] and index keys [T, I] of the new tokens, not yet rounded."""
        latent_TK, turned_TR = self.wkv(x_TD).split([self.shape.kv_lora_rank, self.shape.qk_rope_head_dim], dim=-1)
        latent_TK = rms_norm(latent_TK.contiguous(), self.kv_norm.weight, EPS)
        key_TI = rope(self.index_norm(self.index_wk(x_TD)), *step.rotation) @ self.signs_II
        return latent_TK, rope(turned_TR.contiguous(), *step.rotation), key_TI

    def write(self, x_TD: Tensor, step: Step, cache: LatentCache) -> None:
        """The new tokens go into the cache."""
        latent_TK, turned_TR, key_TI = self.new_tokens(x_TD, step)
        _store(latent_TK, step.rows_T, cache.codes, cache.scales)
        cache.rotary.index_copy_(0, step.rows_T, turned_TR)
        _store(key_TI, step.rows_T, cache.index_codes, cache.index_scales)

    def index_queries(self, q_latent_TQ: Tensor, step: Step) -> Tensor:
        """[T, J, I], not yet rounded."""
        q_TJI = self.index_wq(q_latent_TQ).unflatten(-1, (self.shape.index_n_heads, -1))
        return rope(q_TJI, *step.rotation) @ self.signs_II

    def head_weights(self, x_TD: Tensor) -> Tensor:
        """Of the indexer, FP32 [T, J]."""
        return wide(self.index_weights(x_TD)) * (self.shape.index_n_heads**-0.5 * self.shape.index_head_dim**-1.5)

    def pick(self, x_TD: Tensor, q_latent_TQ: Tensor, step: Step, cache: LatentCache) -> Tensor:
        """Rows of the tokens each query attends to, int32 [T, M], -1 behind them; M at most what a sequence has."""
        q_TJI, weight_TJ = self.index_queries(q_latent_TQ, step), self.head_weights(x_TD)
        if not use_kernel("v32 pick", x_TD):
            return reference_picks(q_TJI, weight_TJ, step, cache, self.shape.index_topk)
        from v32_kernels import pick

        codes_TJI = torch.empty(q_TJI.shape, dtype=torch.uint8, device=q_TJI.device)
        scale_TJ1 = torch.empty(*q_TJI.shape[:2], 1, device=q_TJI.device)
        _store(q_TJI.flatten(0, 1), None, codes_TJI.flatten(0, 1), scale_TJ1.flatten(0, 1))
        return pick(
            codes_TJI.view(torch.float8_e4m3fn),
            scale_TJ1.squeeze(-1),
            weight_TJ,
            cache.index_codes.view(torch.float8_e4m3fn),
            cache.index_scales,
            step.pages_NP,
            step.sequence_T,
            step.visible_T,
            min(self.shape.index_topk, cache.capacity),
        )

    def attend(self, q_HTK: Tensor, q_THX: Tensor, rows_TM: Tensor, cache: LatentCache) -> Tensor:
        """Weighted sums of latents [T, H, K]."""
        scale = q_THX.shape[-1] ** -0.5
        if use_kernel("v32 attend", q_HTK):
            from v32_kernels import attend

            return attend(q_HTK, q_THX, cache.codes, cache.scales, cache.rotary, rows_TM, self.no_sink_H, scale)
        row_TM = rows_TM.clamp_min(0).long()
        latent_TMK = dequantized(cache.codes[row_TM], cache.scales[row_TM], q_HTK.dtype)
        scores_THM = wide(q_HTK.transpose(0, 1)) @ wide(latent_TMK).mT
        scores_THM += wide(q_THX[..., self.shape.qk_nope_head_dim :]) @ wide(cache.rotary[row_TM]).mT
        scores_THM.mul_(scale).masked_fill_((rows_TM < 0)[:, None], float("-inf"))
        return (scores_THM.softmax(-1) @ wide(latent_TMK)).to(q_HTK.dtype)


def reference_picks(q_TJI: Tensor, weight_TJ: Tensor, step: Step, cache: LatentCache, topk: int) -> Tensor:
    """The picks of exact scores of what rounding leaves of queries and keys."""
    keys_TCI = dequantized(cache.index_codes, cache.index_scales, torch.float32).unflatten(0, (len(q_TJI), -1))
    scores_TC = index_scores(fp8.fake_quantize(q_TJI.float(), q_TJI.shape[-1]), weight_TJ, keys_TCI)
    picked_TM = select_topk(scores_TC, step.visible_T, min(topk, cache.capacity))
    return torch.where(picked_TM < 0, -1, picked_TM + (step.sequence_T * cache.capacity)[:, None]).int()


def dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of uint8 codes and their scales."""
    return fp8.dequantize(codes.view(torch.float8_e4m3fn), scales, codes.shape[-1] // scales.shape[-1]).to(dtype)


def _store(x_XK: Tensor, rows_X: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    """codes[rows], scales[rows] = x in blocks of columns; without rows, all of them in their places."""
    block = codes.shape[1] // scales.shape[1]
    if use_kernel("v32 store", x_XK):
        from v32_kernels import quantize_rows

        quantize_rows(x_XK.contiguous(), rows_X, codes, scales, block)
        return
    found, scale = fp8.quantize(x_XK, block)
    place = slice(None) if rows_X is None else rows_X
    codes[place], scales[place] = found.view(torch.uint8), scale


def random_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> LatentAttention:
    """Weights that depend on nothing but their order, at scales that keep every signal near 1."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        layer = LatentAttention(shape)
    for name, parameter in layer.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=device)
        inputs = parameter.shape[1] if name.endswith(("_HPK", "_HKU")) else parameter.shape[-1]
        values = values * inputs**-0.5 if parameter.ndim > 1 else values * 0.1 + (name.endswith("norm.weight"))
        parameter.data = values.to(dtype)
    layer.signs_II = layer.signs_II.to(dtype)
    return layer.requires_grad_(requires_grad=False)


def serve_in_fp8(layer: LatentAttention) -> None:
    """Hold the maps that V3.2 serves in FP8 in that format."""
    for name in ("wq_a", "wq_b", "wkv", "wo", "index_wq", "index_wk"):
        module = getattr(layer, name)
        module.hold(quantize(module.weight, "fp8", name))
