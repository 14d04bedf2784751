"""ModelConfig: the shape of one DeepSeek-V4 model, as frozen data.

Every field carries the name it has in the published `config.json`, so that the report, the official file and
this code can be read side by side. Two spellings of that file are in use and both are read and written here:

- *official*: the released files (`compress_ratios`, `num_hash_layers`, `rope_scaling`);
- *transformers*: what transformers 5.23 saves (`layer_types`, `compress_rates`, `mlp_layer_types`, and
  `rope_parameters` nested by rotary kind).

The only published values that are nested are the four numbers of `rope_scaling`; they are flat here. Keys that we do
not know are kept in `extra` and come back on writing, because other engines reject a file whose keys changed.

A wrong value stops with the field's name, the value and the rule it breaks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LAYER_TYPE_OF_RATIO = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}
RATIO_OF_LAYER_TYPE = {name: ratio for ratio, name in LAYER_TYPE_OF_RATIO.items()}

CSA_RATIO = 4
HCA_RATIO = 128

SPELLINGS = ("official", "transformers")


class ConfigError(ValueError):
    """A configuration value breaks a rule; the message names the field, the value and the rule."""


@dataclass(frozen=True)
class ModelConfig:
    """All numbers of one model. Letters in brackets are the shape suffixes used throughout the code."""

    vocab_size: int  # [V]
    hidden_size: int  # [D]
    num_hidden_layers: int
    # One entry per layer, then one per MTP block: 0 = window only, 4 = CSA, 128 = HCA.
    compress_ratios: tuple[int, ...]

    # Attention (report 2.3)
    num_attention_heads: int  # [H]
    head_dim: int  # [K]; one shared head is key and value
    q_lora_rank: int  # [Q]
    o_groups: int  # [O]
    o_lora_rank: int  # [L]
    index_topk: int  # [M]
    index_n_heads: int  # [J]
    index_head_dim: int  # [I]
    qk_rope_head_dim: int = 64  # [R], the last R of K (and of I)
    sliding_window: int = 128  # [W]
    num_key_value_heads: int = 1

    # Mixture of experts (report 2.1)
    n_routed_experts: int = 256  # [E]
    num_experts_per_tok: int = 6  # [A]
    moe_intermediate_size: int = 2048  # [F]
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    hidden_act: str = "silu"

    # Manifold-constrained hyper-connections (report 2.2)
    hc_mult: int = 4  # [S]
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 1

    # Rotary embedding: plain base on window-only layers; its own base and YaRN on CSA and HCA layers
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    max_position_embeddings: int = 1048576

    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    torch_dtype: str = "bfloat16"
    expert_dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = None

    extra: Mapping[str, Any] = field(default_factory=dict)  # keys of the file that we do not know, kept as found

    def __post_init__(self) -> None:
        _check_list("compress_ratios", self.compress_ratios, int)
        object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        for name, value in self.__dict__.items():
            expected = _FIELD_KINDS.get(name)
            if expected is not None and (
                not isinstance(value, expected) or isinstance(value, bool) != (expected is bool)
            ):
                kinds = expected if isinstance(expected, tuple) else (expected,)
                words = ("None" if kind is type(None) else kind.__name__ for kind in kinds)
                _refuse(name, value, f"must be of type {' or '.join(words)}")
            if isinstance(value, float) and not math.isfinite(value):
                _refuse(name, value, "must be finite")
        _check_rules(self)

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each trunk layer."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def mtp_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each MTP block."""
        return self.compress_ratios[self.num_hidden_layers :]

    @property
    def has_draft_stages(self) -> bool:
        """Whether the weights named `mtp.*` are the draft stages of the DSpark refresh instead of MTP blocks."""
        return "dspark_block_size" in self.extra

    def is_hash_layer(self, layer: int) -> bool:
        """Whether this trunk layer routes by token id (report 2.1)."""
        return layer < self.num_hash_layers

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; the rules are checked again."""
        return dataclasses.replace(self, **changes)

    # -- reading ----------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read either spelling of a published `config.json`."""
        remaining = dict(values)
        model_type = remaining.pop("model_type", "deepseek_v4")
        if model_type != "deepseek_v4":
            _refuse("model_type", model_type, "must be 'deepseek_v4'")
        remaining.pop("architectures", None)
        if "layer_types" in remaining or "rope_parameters" in remaining:
            _fold_transformers_spelling(remaining)
        # Files in transformers' spelling exist whose rotary part is still official.
        _fold_official_spelling(remaining)
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        arguments = {name: remaining.pop(name) for name in list(remaining) if name in known}
        for name, value in arguments.items():
            # JSON does not tell 10000 from 10000.0; a float field takes both.
            if _FIELD_KINDS.get(name) is float and isinstance(value, int) and not isinstance(value, bool):
                arguments[name] = float(value)
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        for name in required:
            if name not in arguments:
                raise ConfigError(f"config field '{name}' is missing: every published config.json has it")
        return cls(**arguments, extra=remaining)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a `config.json`, or the one inside a checkpoint folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint folder holds a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds a {type(values).__name__}, expected a JSON object")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    # -- writing ----------------------------------------------------------------------------------------------

    def to_dict(self, spelling: str = "official") -> dict[str, Any]:
        """The content of `config.json` in one of `SPELLINGS`; unknown keys come back unchanged."""
        if spelling not in SPELLINGS:
            raise ValueError(f"spelling {spelling!r} is not one of {SPELLINGS}")
        values: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
        for f in dataclasses.fields(self):
            if f.name not in _NESTED_OR_RENAMED:
                values[f.name] = getattr(self, f.name)
        for name in ("expert_dtype", "quantization_config"):
            if getattr(self, name) is not None:
                value = getattr(self, name)
                values[name] = dict(value) if isinstance(value, Mapping) else value
        yarn = {
            "factor": self.rope_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        if spelling == "official":
            values["compress_ratios"] = list(self.compress_ratios)
            values["num_hash_layers"] = self.num_hash_layers
            values["rope_scaling"] = {"type": "yarn", **yarn}
            values["torch_dtype"] = self.torch_dtype
        else:
            hashed = min(self.num_hash_layers, self.num_hidden_layers)
            partial = self.qk_rope_head_dim / self.head_dim
            values["layer_types"] = [LAYER_TYPE_OF_RATIO[ratio] for ratio in self.layer_ratios]
            values["compress_rates"] = {LAYER_TYPE_OF_RATIO[r]: r for r in (CSA_RATIO, HCA_RATIO)}
            values["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (self.num_hidden_layers - hashed)
            values["partial_rotary_factor"] = partial
            values["rope_parameters"] = {
                "main": {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": partial},
                "compress": {
                    "rope_type": "yarn",
                    "rope_theta": self.compress_rope_theta,
                    "partial_rotary_factor": partial,
                    "attention_factor": 1.0,
                    **yarn,
                },
            }
            values["dtype"] = self.torch_dtype
        return {**self.extra, **values}

    def to_json(self, spelling: str = "official") -> str:
        """`to_dict` as the text of a `config.json`."""
        return json.dumps(self.to_dict(spelling), indent=2, ensure_ascii=False) + "\n"


# Fields whose place or name in the file differs from the dataclass; `to_dict` writes them by hand.
_NESTED_OR_RENAMED = {
    "extra", "compress_ratios", "num_hash_layers", "rope_factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "torch_dtype", "expert_dtype", "quantization_config",
}  # fmt: skip


def _field_kind(annotation: str) -> Any:
    """What a field of this annotation may hold, for isinstance; None where `_check_list` checks."""
    none = type(None)
    return {
        "int": int,
        "float": float,
        "bool": bool,
        "str": str,
        "int | None": (int, none),
        "str | None": (str, none),
        "Mapping[str, Any]": Mapping,
        "Mapping[str, Any] | None": (Mapping, none),
    }.get(annotation)


_FIELD_KINDS = {f.name: _field_kind(str(f.type)) for f in dataclasses.fields(ModelConfig)}


def _refuse(name: str, value: Any, rule: str) -> NoReturn:
    raise ConfigError(f"config field '{name}' = {value!r}: {rule}")


def _check_list(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, list | tuple) or not all(type(item) is kind for item in value):
        _refuse(name, value, f"must be a list of {kind.__name__}")


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        _refuse(name, value, f"must be an object, got {type(value).__name__}")


def _fold_official_spelling(values: dict[str, Any]) -> None:
    """Flatten `rope_scaling` in place."""
    yarn = values.pop("rope_scaling", None)
    if yarn is not None:
        _fold_yarn(values, yarn, "rope_scaling")
    if "dtype" in values and "torch_dtype" not in values:
        values["torch_dtype"] = values.pop("dtype")


def _fold_yarn(values: dict[str, Any], yarn: Any, where: str) -> None:
    if not isinstance(yarn, Mapping):
        _refuse(where, yarn, "must be an object with factor, original_max_position_embeddings, beta_fast, beta_slow")
    kind = yarn.get("rope_type", yarn.get("type", "yarn"))
    if kind == "default":
        values["rope_factor"] = 1.0
        return
    if kind != "yarn":
        _refuse(f"{where}.type", kind, "must be 'yarn'")
    if yarn.get("attention_factor") not in (None, 1, 1.0):
        _refuse(
            f"{where}.attention_factor", yarn["attention_factor"], "must be 1: V4 never scales the rotary amplitude"
        )
    for there, here in {
        "factor": "rope_factor",
        "original_max_position_embeddings": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    }.items():
        if there in yarn:
            values[here] = yarn[there]


def _fold_transformers_spelling(values: dict[str, Any]) -> None:
    """Rewrite transformers' names to the official ones in place."""
    layer_types = values.pop("layer_types", None)
    if layer_types is not None:
        _check_list("layer_types", layer_types, str)
        rates = values.pop("compress_rates", None) or {}
        _check_mapping("compress_rates", rates)
        for name, rate in rates.items():
            if RATIO_OF_LAYER_TYPE.get(name) != rate:
                _refuse("compress_rates", dict(rates), "must be 4 for CSA and 128 for HCA")
        for name in layer_types:
            if name not in RATIO_OF_LAYER_TYPE:
                _refuse("layer_types", name, f"entries must be one of {sorted(RATIO_OF_LAYER_TYPE)}")
        # transformers drops the MTP blocks; the released models all use window-only attention there. The DSpark refresh
        # has one draft stage for each layer that it listens to, and still says 1.
        num_mtp = values.get("num_nextn_predict_layers", 1)
        if isinstance(targets := values.get("dspark_target_layer_ids"), list):
            num_mtp = len(targets)
        mtp = (0,) * num_mtp if isinstance(num_mtp, int) else ()
        values["compress_ratios"] = tuple(RATIO_OF_LAYER_TYPE[name] for name in layer_types) + mtp
    mlp_types = values.pop("mlp_layer_types", None)
    if mlp_types is not None:
        _check_list("mlp_layer_types", mlp_types, str)
        hashed = sum(name == "hash_moe" for name in mlp_types)
        if list(mlp_types) != ["hash_moe"] * hashed + ["moe"] * (len(mlp_types) - hashed):
            _refuse("mlp_layer_types", mlp_types, "must be 'hash_moe' for the first layers and 'moe' for the rest")
        values["num_hash_layers"] = hashed
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, Mapping) or not {"main", "compress"} <= rope.keys():
            _refuse("rope_parameters", rope, "must hold 'main' and 'compress'")
        for part in ("main", "compress"):
            _check_mapping(f"rope_parameters.{part}", rope[part])
        if rope["main"].get("rope_type", "default") != "default":
            _refuse("rope_parameters.main.rope_type", rope["main"]["rope_type"], "must be 'default'")
        values["rope_theta"] = rope["main"].get("rope_theta", values.get("rope_theta", 10000.0))
        values["compress_rope_theta"] = rope["compress"].get("rope_theta", values.get("compress_rope_theta", 160000.0))
        _fold_yarn(values, rope["compress"], "rope_parameters.compress")
    partial = values.pop("partial_rotary_factor", None)
    if partial is not None and "qk_rope_head_dim" not in values:
        head_dim = values.get("head_dim")
        if not isinstance(partial, float | int) or not isinstance(head_dim, int):
            _refuse("partial_rotary_factor", partial, f"must be the rotary share of head_dim ({head_dim})")
        values["qk_rope_head_dim"] = round(head_dim * partial)
    quantization = values.get("quantization_config")
    if isinstance(quantization, Mapping) and "expert_dtype" in quantization:
        values.setdefault("expert_dtype", quantization["expert_dtype"])
        values["quantization_config"] = {k: v for k, v in quantization.items() if k != "expert_dtype"}


def _check_rules(c: ModelConfig) -> None:
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
        "o_lora_rank", "index_topk", "index_n_heads", "index_head_dim", "sliding_window", "n_routed_experts",
        "num_experts_per_tok", "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings",
        "original_max_position_embeddings",
    ):  # fmt: skip
        if getattr(c, name) < 1:
            _refuse(name, getattr(c, name), "must be at least 1")
    for name in (
        "hc_eps",
        "rms_norm_eps",
        "rope_theta",
        "compress_rope_theta",
        "routed_scaling_factor",
        "swiglu_limit",
        "initializer_range",
    ):
        if not getattr(c, name) > 0:
            _refuse(name, getattr(c, name), "must be positive")
    for name, only in {
        "num_key_value_heads": 1, "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
        "norm_topk_prob": True, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }.items():  # fmt: skip
        if getattr(c, name) != only:
            _refuse(name, getattr(c, name), f"must be {only!r}: every DeepSeek-V4 model is built so")
    if len(c.compress_ratios) < c.num_hidden_layers:
        _refuse(
            "compress_ratios",
            list(c.compress_ratios),
            f"must have one entry per layer ({c.num_hidden_layers}), then one per MTP block",
        )
    # The DSpark refresh ships three draft stages while num_nextn_predict_layers still reads 1: the list decides.
    if len(c.compress_ratios) < c.num_hidden_layers + c.num_nextn_predict_layers:
        _refuse(
            "compress_ratios",
            list(c.compress_ratios),
            f"must have num_hidden_layers + num_nextn_predict_layers = "
            f"{c.num_hidden_layers + c.num_nextn_predict_layers} entries",
        )
    for ratio in c.compress_ratios:
        if ratio not in LAYER_TYPE_OF_RATIO:
            _refuse("compress_ratios", ratio, "entries must be 0 (window only), 4 (CSA) or 128 (HCA)")
    if any(c.mtp_ratios):
        _refuse("compress_ratios", list(c.compress_ratios), "the entries of the MTP blocks must be 0")
    if c.num_nextn_predict_layers < 0:
        _refuse("num_nextn_predict_layers", c.num_nextn_predict_layers, "must not be negative")
    if not c.num_hash_layers >= 0:
        _refuse("num_hash_layers", c.num_hash_layers, "must not be negative")
    if c.num_attention_heads % c.o_groups:
        _refuse("o_groups", c.o_groups, f"must divide num_attention_heads ({c.num_attention_heads})")
    if c.qk_rope_head_dim % 2 or c.qk_rope_head_dim < 2:
        _refuse("qk_rope_head_dim", c.qk_rope_head_dim, "must be even and positive: the rotation works on pairs")
    for name in ("head_dim", "index_head_dim"):
        if getattr(c, name) < c.qk_rope_head_dim:
            _refuse(name, getattr(c, name), f"must be at least qk_rope_head_dim ({c.qk_rope_head_dim})")
    if c.num_experts_per_tok > c.n_routed_experts:
        _refuse(
            "num_experts_per_tok", c.num_experts_per_tok, f"must not exceed n_routed_experts ({c.n_routed_experts})"
        )
    if c.rope_factor < 1:
        _refuse("rope_factor", c.rope_factor, "must be at least 1")
    if not c.beta_fast > c.beta_slow > 0:
        _refuse("beta_fast", c.beta_fast, f"must exceed beta_slow ({c.beta_slow}), both positive")


def _interleaved(first: tuple[int, int], pairs: int) -> tuple[int, ...]:
    """The released schedules: two opening layers, (CSA, HCA) pairs, a last CSA, then the MTP block."""
    return (*first, *((CSA_RATIO, HCA_RATIO) * pairs), CSA_RATIO, 0)


_RELEASED_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    compress_ratios=_interleaved((0, 0), 20),
    num_attention_heads=64,
    head_dim=512,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    index_topk=512,
    index_n_heads=64,
    index_head_dim=128,
    expert_dtype="fp4",
    quantization_config=_RELEASED_QUANTIZATION,
)

PRO = FLASH.replace(
    hidden_size=7168,
    num_hidden_layers=61,
    compress_ratios=_interleaved((HCA_RATIO, HCA_RATIO), 29),
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    index_topk=1024,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)

# Every mechanism in four layers, small enough for a unit test.
TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4, 0),
    num_attention_heads=4,
    head_dim=32,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=32,
    index_topk=8,
    index_n_heads=16,
    index_head_dim=32,
    qk_rope_head_dim=16,
    sliding_window=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
    original_max_position_embeddings=256,
    max_position_embeddings=4096,
    torch_dtype="float32",
)

# The demo's model: trains on two CPU cores in minutes.
NANO = ModelConfig(
    vocab_size=8192,
    hidden_size=128,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4, 0),
    num_attention_heads=4,
    head_dim=64,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    index_topk=32,
    index_n_heads=4,
    index_head_dim=32,
    qk_rope_head_dim=16,
    sliding_window=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    original_max_position_embeddings=4096,
    max_position_embeddings=65536,
    torch_dtype="float32",
)

PRESETS = {"flash": FLASH, "pro": PRO, "tiny": TINY, "nano": NANO}
