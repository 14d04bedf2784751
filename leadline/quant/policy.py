"""Which weight is held in which format.

`RULES` is the whole answer for the released models (report 5.2.1, and the dtypes of the published files): one row for
each weight that is not plain. Everything else is as it is: embedding, head, router, compressors, the indexer's head
weights, norms in BF16, and hyper-connections, sinks and biases in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from leadline.model.config import ModelConfig
from leadline.model.linear import Linear
from leadline.model.moe import Experts
from leadline.ops.quantized_linear import Format, quantize


@dataclass(frozen=True)
class Rule:
    """One row: the weights whose name matches `tensors` (`*` stands for any text) are held in `format`."""

    tensors: str
    format: Format
    why: str


RULES = (
    Rule("*.attn.wq_a.weight", "fp8", "down to the query latent"),
    Rule("*.attn.wq_b.weight", "fp8", "up to the heads"),
    Rule("*.attn.wkv.weight", "fp8", "the shared key and value"),
    Rule("*.attn.wo_a.weight", "fp8", "the groups' maps; multiplied in BF16"),
    Rule("*.attn.wo_b.weight", "fp8", "the output"),
    Rule("*.attn.indexer.wq_b.weight", "fp8", "up to the indexer's heads"),
    Rule("*.ffn.shared_experts.w[123].weight", "fp8", "read for every token"),
    Rule("*.ffn.experts.w[123]", "fp4", "nearly all of the bytes"),
    Rule("mtp.*.e_proj.weight", "fp8", "into the extra block"),
    Rule("mtp.*.h_proj.weight", "fp8", "into the extra block"),
    Rule("mtp.*.main_proj.weight", "fp8", "into the draft stages"),
)


@dataclass(frozen=True)
class Policy:
    """The formats of a model: the rules, and what the base models do otherwise.

    experts: the routed experts' format. scale_dtype: float8_e8m0fnu, or float32, which holds the same powers of two.
    """

    experts: Format = "fp4"
    scale_dtype: torch.dtype = torch.float8_e8m0fnu

    def format_of(self, name: str) -> Format | None:
        """The format of one of our model's tensors, None for a plain one."""
        found = next((rule for rule in RULES if fnmatchcase(name, rule.tensors)), None)
        if found is None:
            return None
        return self.experts if found.format == "fp4" else found.format


RELEASED = Policy()
BASE = Policy(experts="fp8", scale_dtype=torch.float32)


def policy_of(config: ModelConfig) -> Policy | None:
    """The policy that a checkpoint's configuration states; None when its weights are plain."""
    if config.quantization_config is None:
        return None
    return RELEASED if config.expert_dtype == "fp4" else BASE


def quantizable(model: nn.Module) -> Iterator[tuple[str, Linear | Experts, str]]:
    """(name in the model, owner, name in the owner) of every weight that its owner can `hold` in another format."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            yield f"{path}.weight", module, "weight"
        elif isinstance(module, Experts):
            yield from ((f"{path}.{name}", module, name) for name in ("w1", "w2", "w3"))


@torch.no_grad()
def quantize_model(model: nn.Module, policy: Policy = RELEASED) -> None:
    """Round every weight that the policy names to its format, in place, and hold it so.

    One weight after the other: beside the model, the most in memory is one of them, and a piece of it in float32. A
    weight that is quantised already stays. ValueError names a weight whose FP4 form would not be exact in FP8; those
    before it are quantised then.
    """
    for name, owner, leaf in quantizable(model):
        format = policy.format_of(name)
        weight = getattr(owner, leaf)
        if format is not None and isinstance(weight, nn.Parameter):
            owner.hold(quantize(weight, format, name, policy.scale_dtype), leaf)
