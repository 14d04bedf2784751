"""The engine against transformers on one card: a long prompt, and decoding after it.

`engine_h100.py --peer` runs it. Both sides get the same random weights: layers 2 and up of V4-Flash, CSA and HCA in
turn, at full width, with 64 experts each, as many layers as transformers' eager attention leaves room for. Three runs
of the same model: leadline's engine in bfloat16, with a cache of bfloat16; transformers' `DeepseekV4ForCausalLM` in
bfloat16 with eager attention and its own `DynamicCache`, in a loop that does nothing but feed back the best token; and
leadline's engine with what it serves, the same weights rounded to FP4 and FP8 and a packed cache.

First the gate: on a short prompt the logits of both bfloat16 sides must agree. Half a step of bfloat16 sends a token to
another expert now and then, and the more layers, the more tokens are touched by it. So the gate asks for the quarter of
the tokens that agree best, and they must agree to 6e-2 of the size of their logits; a wrong weight moves every token,
by 0.1 and more. When they do not, nothing is reported.

- *prefill*: from the prompt to its first token, the best of three;
- *decode*: one more token after that, the median of many steps.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leadline.engine.engine import Engine, Settings
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, Sampling
from leadline.model import accounting
from leadline.model.cache_format import PACKED
from leadline.model.config import FLASH, ModelConfig
from leadline.model.page_table import num_pages
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.quant.policy import quantize_model
from leadline.weights.names import file_tensors, keeps_float32

SEED = 0
NUM_LAYERS = (12, 8, 4, 2)  # the first of these that fits
GREEDY = Sampling(temperature=0.0)
GATE_TOLERANCE, GATE_SHARE = 6e-2, 0.25
# What eager attention holds at once, in matrices of scores of bfloat16 (measured for one layer at 8,192 tokens), and
# the part of a card that one program can use.
SCORES_AT_ONCE, USABLE = 3.5, 0.92


class PeerError(ValueError):
    """The comparison cannot be made; the message says what was found."""


@dataclass(frozen=True)
class Sizes:
    """prompt, new: tokens read and drawn; repeats: of the prompt; gate: tokens of the gate's prompt; gate_rows: of
    them, how many of the last are compared."""

    prompt: int = 8192
    new: int = 24
    repeats: int = 3
    gate: int = 700
    gate_rows: int = 256


@dataclass(frozen=True)
class Times:
    """Seconds from the prompt to its first token, and of one more token."""

    prefill: float
    decode: float


# -- the model -----------------------------------------------------------------------------------------------------


def config_of(layers: int, experts: int) -> ModelConfig:
    """V4-Flash's layers from the first CSA layer on, in plain bfloat16."""
    return FLASH.replace(
        num_hidden_layers=layers,
        compress_ratios=FLASH.layer_ratios[2 : 2 + layers],
        num_nextn_predict_layers=0,
        n_routed_experts=experts,
        expert_dtype=None,
        quantization_config=None,
    )


def layers_that_fit(config: ModelConfig, tokens: int, free_bytes: float) -> int:
    """Of layers like this model's, how many fit beside what eager attention needs for a prompt."""
    embeddings = 2 * accounting.embedding_parameters(config)
    per_layer = (accounting.parameters_total(config) - embeddings) / config.num_hidden_layers
    scores = config.num_attention_heads * tokens * (tokens + tokens / 4)
    bf16 = accounting.BF16_BYTES
    return int((USABLE * free_bytes / bf16 - SCORES_AT_ONCE * scores - embeddings) // per_layer)


@torch.no_grad()
def build(config: ModelConfig, device: torch.device) -> Transformer:
    """The model with random weights that depend on `SEED` alone, made where it lies, at scales that keep every signal
    near 1. All are numbers of bfloat16, also where the model holds them in float32."""
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = getattr(torch, config.torch_dtype)
    with torch.device("meta"):
        model = Transformer(config, with_mtp=False)
    for name, empty in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if empty.is_floating_point():
            values = _normal(name, empty.shape, generator, dtype)
            values = values.float() if keeps_float32(name) else values
        else:
            order_VE = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator, device=device)
            values = order_VE.argsort(dim=1)[:, : config.num_experts_per_tok]
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        else:
            owner._buffers[leaf] = values
    return model


def _normal(name: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    if len(shape) > 1:
        return values.normal_(0.0, shape[-1] ** -0.5, generator=generator)
    return values.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.1, generator=generator)


def in_transformers(config: ModelConfig, ours: dict[str, Tensor], device: torch.device) -> nn.Module:
    """transformers' model with our tensors, of which `ours` is emptied, so that few are there twice."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    settings = DeepseekV4Config(**config.to_dict("transformers"))
    settings._attn_implementation = "eager"
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(settings)
    dtype = getattr(torch, config.torch_dtype)
    files = file_tensors({name: tuple(tensor.shape) for name, tensor in ours.items()}, "transformers")
    theirs = {}
    for name, file in files.items():
        parts = [ours.pop(part.ours) for part in file.parts]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        theirs[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    model.load_state_dict(theirs, assign=True)
    for module in list(model.modules()):  # frequencies are no part of the weights
        if hasattr(module, "rotary_emb"):
            with torch.device(device):
                module.rotary_emb = DeepseekV4RotaryEmbedding(settings)
    return model.eval()


# -- logits --------------------------------------------------------------------------------------------------------


def random_prompt(config: ModelConfig, tokens: int) -> tuple[int, ...]:
    return tuple(random.Random(SEED).choices(range(config.vocab_size), k=tokens))


@torch.no_grad()
def our_logits(model: Transformer, prompt: Sequence[int], rows: int) -> Tensor:
    """FP32 logits [rows, V] of the last tokens."""
    output = model(Segment.of(prompt, device=model.embed.weight.device))
    return model.logits(model.hidden(output.streams_TSD[-rows:]))


@torch.no_grad()
def their_logits(model: nn.Module, prompt: Sequence[int], rows: int, device: torch.device) -> Tensor:
    tokens_1T = torch.tensor([prompt], device=device)
    return model(input_ids=tokens_1T, use_cache=False, logits_to_keep=rows).logits[0].float()


def difference(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    """The distance of the logits, relative to their size, that the best quarter of the tokens stays below; NaN when any
    is."""
    distance_T = (ours_TV - theirs_TV).norm(dim=1) / theirs_TV.norm(dim=1)
    return float(distance_T.quantile(GATE_SHARE))


# -- times ---------------------------------------------------------------------------------------------------------


def our_times(model: Transformer, prompt: tuple[int, ...], sizes: Sizes) -> Times:
    tokens = len(prompt) + sizes.new + 1
    settings = Settings(
        slots=1,
        pages=num_pages(tokens) + 2,
        max_tokens=tokens,
        step_tokens=max(128, len(prompt)),
        policy=WindowPolicy("zero"),
    )
    engine, prefill, decode = Engine(model, settings), [], []
    for number in range(1 + sizes.repeats):  # the first one compiles
        engine.submit(Request(prompt, sizes.new, GREEDY, namespace=str(number)))
        prefill.append(_seconds(lambda: _until_a_token(engine), model.embed.weight.device))
        decode = []
        while engine.busy:
            decode.append(_seconds(engine.step, model.embed.weight.device))
    return Times(min(prefill[1:]), sorted(decode)[len(decode) // 2])


def _until_a_token(engine: Engine) -> None:
    while True:
        events = engine.step()
        for event in events:
            if event.error:
                raise PeerError(f"the engine gave up: {event.error}")
        if any(event.tokens for event in events):
            return


@torch.no_grad()
def their_times(model: nn.Module, prompt: tuple[int, ...], sizes: Sizes, device: torch.device) -> Times:
    from transformers import DynamicCache

    prefill, decode = [], []
    for _ in range(1 + sizes.repeats):
        cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
        token_1T = torch.tensor([prompt], device=device)

        def feed(token_1T: Tensor, cache: DynamicCache = cache) -> Tensor:
            output = model(input_ids=token_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1:].argmax(-1)

        found: list[Tensor] = []
        prefill.append(_seconds(lambda: found.append(feed(token_1T)), device))  # noqa: B023
        decode = [_seconds(lambda: found.append(feed(found[-1])), device) for _ in range(sizes.new - 1)]  # noqa: B023
    return Times(min(prefill[1:]), sorted(decode)[len(decode) // 2])


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the comparison ------------------------------------------------------------------------------------------------


def compare(config: ModelConfig, sizes: Sizes, device: torch.device) -> tuple[dict[str, Times], str]:
    """Times of the three runs by name, and what is to be said of them."""
    short, prompt = random_prompt(config, sizes.gate), random_prompt(config, sizes.prompt)
    model = build(config, device)
    ours_TV = our_logits(model, short, sizes.gate_rows)
    times = {"leadline bf16": our_times(model, prompt, sizes)}
    tensors = model.state_dict()
    del model
    peer = in_transformers(config, tensors, device)
    found = difference(ours_TV, their_logits(peer, short, sizes.gate_rows, device))
    if not found <= GATE_TOLERANCE:
        raise PeerError(f"the logits differ by {found:.1e}, more than {GATE_TOLERANCE:.0e}: nothing is reported")
    times["transformers"] = their_times(peer, prompt, sizes, device)
    experts = getattr(peer.config, "_experts_implementation", None)
    del peer, ours_TV
    forget(device)
    model = build(config, device)
    quantize_model(model)
    model.cache_format = PACKED
    times["leadline as served"] = our_times(model, prompt, sizes)
    return times, f"logits differ by {found:.1e}; transformers' experts: {experts or 'eager'}"


def forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows(times: dict[str, Times], layers: int, context: int, note: str) -> list[dict[str, str]]:
    """One row for the prompt and one for decoding, in the README's columns."""
    return [
        {
            "work": work,
            "context": f"{context:,}",
            "layers": str(layers),
            **{f"{name} ms": f"{1000 * getattr(found, work):,.1f}" for name, found in times.items()},
            **{
                f"{name} faster": f"{getattr(times['transformers'], work) / getattr(found, work):.1f}x"
                for name, found in times.items()
                if name != "transformers"
            },
            "note": note,
        }
        for work in ("prefill", "decode")
    ]


def measure(
    experts: int, sizes: Sizes, device: torch.device, make: Callable[[int, int], ModelConfig] = config_of
) -> list[dict[str, str]]:
    """The rows for the most layers that fit; what did not fit, though it should have, is said in them."""
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**60
    fitting = layers_that_fit(make(NUM_LAYERS[0], experts), sizes.prompt, free_bytes)
    failed: list[int] = []
    for layers in NUM_LAYERS:
        if layers > fitting:
            continue
        try:
            times, note = compare(make(layers, experts), sizes, device)
        except torch.OutOfMemoryError:
            failed.append(layers)
        else:
            note += "".join(f"; {number} layers did not fit" for number in failed)
            return rows(times, layers, sizes.prompt, note)
        forget(device)
    raise PeerError(
        f"{free_bytes / 2**30:.0f} GiB of free memory: not even {NUM_LAYERS[-1]} layers with {experts} experts fit"
    )
