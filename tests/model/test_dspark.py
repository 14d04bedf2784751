"""The draft stages against their definition, written out for one sequence and one block without a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.model.cache_format import PACKED, SERVED
from leadline.model.config import TINY, ConfigError, ModelConfig
from leadline.model.dspark import DraftStage, DSpark, DSparkConfig
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import DraftBlocks, Transformer
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import frequencies, rope, rotations

RandomModel = Callable[[ModelConfig, int], Transformer]

BLOCK, NOISE, TARGETS, RANK, STAGES = 5, 255, (1, 3), 6, 3
FIELDS = {
    "dspark_block_size": BLOCK,
    "dspark_noise_token_id": NOISE,
    "dspark_target_layer_ids": list(TARGETS),
    "dspark_markov_rank": RANK,
}
# Every token visits all experts, so that rounding cannot change a choice.
CONFIG = TINY.replace(
    compress_ratios=TINY.layer_ratios + (0,) * STAGES, n_routed_experts=3, num_experts_per_tok=3, extra=FIELDS
)
W = CONFIG.sliding_window


@pytest.fixture(scope="session")
def model(random_model: RandomModel) -> Transformer:
    return random_model(CONFIG, 3).double()


def state_of(model: Transformer, slots: int, spare: int = BLOCK) -> State:
    weight = model.embed.weight
    return State(model.config, slots, 64, spare_tokens=spare, cache_format=model.cache_format, dtype=weight.dtype)


def rotated(x_XK: Tensor, positions: range, *, inverse: bool = False) -> Tensor:
    table = frequencies(CONFIG.qk_rope_head_dim, CONFIG.rope_theta)
    return rope(x_XK, *rotations(torch.tensor(positions), table), inverse=inverse)


def attend(stage: DraftStage, x_BD: Tensor, main_XD: Tensor, position: int) -> Tensor:
    """Rows at position + 1 and on see the last W keys of the trunk, up to `position`, and each other."""
    attn, eps = stage.attn, CONFIG.rms_norm_eps
    first = max(0, position + 1 - W)
    block = range(position + 1, position + 1 + BLOCK)
    q_BHK = attn.wq_b(rms_norm(attn.wq_a(x_BD), attn.q_norm.weight, eps)).unflatten(-1, (attn.heads, attn.width))
    q_BHK = rotated(rms_norm(q_BHK, None, eps), block)
    past_XK = rotated(rms_norm(attn.wkv(main_XD[first:]), attn.kv_norm.weight, eps), range(first, position + 1))
    own_BK = rotated(rms_norm(attn.wkv(x_BD), attn.kv_norm.weight, eps), block)
    keys_XK = torch.cat([past_XK, own_BK])
    scores_BHX = torch.einsum("bhk,xk->bhx", q_BHK, keys_XK) * attn.width**-0.5
    sink_BH1 = attn.attn_sink.expand(BLOCK, -1)[..., None]
    p_BHX = torch.cat([scores_BHX, sink_BH1], -1).softmax(-1)[..., :-1]
    o_BHK = rotated(torch.einsum("bhx,xk->bhk", p_BHX, keys_XK), block, inverse=True)
    return attn.wo_b(attn.wo_a(o_BHK.flatten(1).unflatten(1, (attn.groups, -1))).flatten(1))


@torch.no_grad()
def defined(model: Transformer, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """h [B, D] and logits [B, V] of the block whose anchor is the last of the tokens."""
    outputs: list[Tensor] = []
    hooks = [
        model.layers[number].register_forward_hook(lambda _m, _i, out: outputs.append(out[0].mean(1)))
        for number in TARGETS
    ]
    model(Segment.of(tokens[:-1]))
    for hook in hooks:
        hook.remove()
    stages: Any = list(model.mtp)
    first, last = stages[0], stages[-1]
    main_XD = rms_norm(first.main_proj(torch.cat(outputs, -1)), first.main_norm.weight, CONFIG.rms_norm_eps)
    x_BSD = model.embed(torch.tensor([tokens[-1]] + [NOISE] * (BLOCK - 1)))[:, None].repeat(1, CONFIG.hc_mult, 1)
    for stage in stages:
        x_BSD, y_BD, post, comb = stage.hc_attn.mix_in(x_BSD)
        y_BD = attend(stage, rms_norm(y_BD, stage.attn_norm.weight, CONFIG.rms_norm_eps), main_XD, len(tokens) - 2)
        x_BSD = stage.hc_attn.mix_out(x_BSD, y_BD, post, comb)
        x_BSD, y_BD, post, comb = stage.hc_ffn.mix_in(x_BSD)
        y_BD, _ = stage.ffn(rms_norm(y_BD, stage.ffn_norm.weight, CONFIG.rms_norm_eps), Segment.of(range(BLOCK)))
        x_BSD = stage.hc_ffn.mix_out(x_BSD, y_BD, post, comb)
    h_BD = last.hc_head(x_BSD)
    return h_BD, model.logits(rms_norm(h_BD, last.norm.weight, CONFIG.rms_norm_eps))


@torch.no_grad()
def drafted(model: Transformer, state: State, tokens: list[list[int]], slots: list[int]) -> DraftBlocks:
    """The blocks behind sequences of which all but the last token have been taken in."""
    anchors = Segment.of(*([t[-1]] for t in tokens), past=[len(t) - 1 for t in tokens], slots=slots)
    return model.draft(anchors, state)


def test_blocks_are_those_of_the_definition(model: Transformer) -> None:
    """Several sequences at once, windows that are not yet full, just full and turned over."""
    tokens = [torch.randint(0, 250, (length,)).tolist() for length in (2, W, W + 1, W + 2, 3 * W + 3, 130)]
    slots, state = [4, 0, 5, 2, 1, 3], state_of(model, 6)
    with torch.no_grad():
        model(Segment.of(*(t[:-1] for t in tokens), slots=slots), state)
    found = drafted(model, state, tokens, slots)
    for number, sequence in enumerate(tokens):
        h_BD, logits_BV = defined(model, sequence)
        torch.testing.assert_close(found.h_NBD[number], h_BD, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.logits_NBV[number], logits_BV, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(st.data())
def test_any_way_to_a_place_leads_to_the_same_block(model: Transformer, data: st.DataObject) -> None:
    """Chunks and steps, wrong tokens that are taken back, drafts in between: the windows of the stages and what the
    trunk says stay what they are without."""
    length = data.draw(st.integers(2, 60))
    tokens = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    state, seen = state_of(model, 2), 0
    rows: list[Tensor] = []
    while seen < length - 1:
        take = min(data.draw(st.sampled_from([1, 2, 3, 17, 40])), length - 1 - seen)
        wrong = data.draw(st.integers(0, max(0, 1 + BLOCK - take)))
        fed = tokens[seen : seen + take] + [7] * wrong
        with torch.no_grad():
            streams_TSD = model(Segment.of(fed, past=[seen], slots=[1]), state).streams_TSD
        rows.append(streams_TSD[:take])
        seen += take
        if data.draw(st.booleans()):
            drafted(model, state, [tokens[: seen + 1]], [1])
    found = drafted(model, state, [tokens], [1])
    h_BD, logits_BV = defined(model, tokens)
    torch.testing.assert_close(found.h_NBD[0], h_BD, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.logits_NBV[0], logits_BV, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        alone_TSD = model(Segment.of(tokens[:-1])).streams_TSD
    torch.testing.assert_close(torch.cat(rows), alone_TSD, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("length", range(1, BLOCK + 2))
def test_steps_whose_places_only_the_device_knows_move_the_windows_too(model: Transformer, length: int) -> None:
    """As in a captured graph, for every length of a step that verifies drafts."""
    tokens, blocks = [torch.randint(0, 250, (count,)).tolist() for count in (9, 31)], []
    fed = torch.randint(0, 250, (2 * length,))
    for on_device in (False, True):
        state = state_of(model, 2)
        model(Segment.of(*tokens), state)
        segment = Segment.of(*fed.split(length), past=[9, 31], slots=[0, 1])
        if on_device:
            segment = Segment.on_device(fed, segment.positions_T, segment.slots_N, 64)
        model(segment, state)
        longer = [[*t, *fed[n * length :][:length].tolist(), 5] for n, t in enumerate(tokens)]
        blocks.append(drafted(model, state, longer, [0, 1]).logits_NBV)
    torch.testing.assert_close(*blocks, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_heads(model: Transformer) -> None:
    stages = model.dspark
    assert stages is not None
    last: Any = stages[-1]
    w1_VY, w2_VY = last.markov_head.markov_w1.weight, last.markov_head.markov_w2.weight
    bias_NV = stages.markov_bias(torch.tensor([9, 200]))
    torch.testing.assert_close(bias_NV, torch.stack([w2_VY @ w1_VY[9], w2_VY @ w1_VY[200]]))
    h_NBD, previous_NB = torch.randn(2, BLOCK, CONFIG.hidden_size).double(), torch.randint(0, 250, (2, BLOCK))
    found_NB = stages.confidence(h_NBD, previous_NB)
    weight_X = last.confidence_head.proj.weight[0]
    for n in range(2):
        for b in range(BLOCK):
            logit = weight_X @ torch.cat([h_NBD[n, b], w1_VY[previous_NB[n, b]]])
            assert float(found_NB[n, b]) == pytest.approx(float(torch.sigmoid(logit)))


def test_packed_windows_give_the_bits_of_rounded_ones(random_model: RandomModel) -> None:
    model, blocks = random_model(CONFIG.replace(head_dim=64), 4), []
    tokens = [torch.randint(0, 250, (length,)).tolist() for length in (5, 40)]
    for cache_format in (SERVED, PACKED):
        model.cache_format = cache_format
        state = state_of(model, 2)
        with torch.no_grad():
            model(Segment.of(*(t[:-1] for t in tokens)), state)
        blocks.append(drafted(model, state, tokens, [0, 1]).logits_NBV)
    assert torch.equal(*blocks)


def test_only_spare_rows_change(model: Transformer) -> None:
    """A draft leaves the trunk's memory alone, and of a stage's ring all rows that a later token sees."""
    tokens, state = torch.randint(0, 250, (50,)).tolist(), state_of(model, 1)
    with torch.no_grad():
        model(Segment.of(tokens[:-1]), state)
    before = state.snapshot(0).tensors
    drafted(model, state, [tokens], [0])
    ring = W + BLOCK
    kept = [position % ring for position in range(49 - W, 49)]
    for name, tensor in state.snapshot(0).tensors.items():
        same = torch.equal(tensor[kept], before[name][kept]) if "window" in name else torch.equal(tensor, before[name])
        assert same, name
        assert torch.equal(tensor, before[name]) == (not name.startswith("mtp.")), name


def test_a_block_may_reach_beyond_the_last_page(model: Transformer) -> None:
    """Drafts of the last tokens that a sequence can have: of the block, the first ones may still come."""
    tokens = torch.randint(0, 250, (128,)).tolist()
    state = State(model.config, 2, pages=1, max_tokens=128, spare_tokens=BLOCK, dtype=torch.float64)
    state.assign(1, [0])
    with torch.no_grad():
        model(Segment.of(tokens[:-1], slots=[1]), state)
    found = drafted(model, state, [tokens], [1])
    torch.testing.assert_close(found.h_NBD[0], defined(model, tokens)[0], rtol=1e-9, atol=1e-9)


def test_what_is_missing_is_said(model: Transformer) -> None:
    anchor = Segment.of([1], past=[3])
    with pytest.raises(ValueError, match="the state has 4 spare tokens, a block of drafts takes 5"):
        model.draft(anchor, state_of(model, 1, spare=4))
    with pytest.raises(ValueError, match="draft stages in the place of its MTP block"):
        model.predict_second(model(Segment.of([1])), torch.tensor([1]))
    without = Transformer(CONFIG, with_mtp=False)
    assert without.dspark is None
    with pytest.raises(ValueError, match="built without draft stages"):
        without.draft(anchor, state_of(without, 1))


def test_without_a_state_no_stage_runs(model: Transformer) -> None:
    """Training and evaluation of the trunk do not pay for them."""
    tokens = torch.arange(20)
    without = Transformer(CONFIG, with_mtp=False).double()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    assert torch.equal(model(Segment.of(tokens)).streams_TSD, without(Segment.of(tokens)).streams_TSD)
    assert isinstance(model.mtp, DSpark)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dspark_block_size", 0),
        ("dspark_block_size", True),
        ("dspark_block_size", W + 1),
        ("dspark_noise_token_id", CONFIG.vocab_size),
        ("dspark_markov_rank", None),
        ("dspark_target_layer_ids", []),
        ("dspark_target_layer_ids", [4]),
        ("dspark_target_layer_ids", "123"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"'{field}' = .*: must be "):
        DSparkConfig.of(CONFIG.replace(extra={**FIELDS, field: value}))


def test_stages_need_entries_of_the_list() -> None:
    config = TINY.replace(compress_ratios=TINY.layer_ratios, num_nextn_predict_layers=0, extra=FIELDS)
    with pytest.raises(ConfigError, match="an entry for each draft stage"):
        Transformer(config)
