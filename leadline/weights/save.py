"""From a model to a folder that other programs can load.

The folder holds `config.json` in the spelling that belongs to the naming, `generation_config.json`, the weights, and
the tokenizer's files if given. It appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.weights.files import MAX_SHARD_BYTES
from leadline.weights.folder import TOKENIZER_FILES, new_folder
from leadline.weights.header import CASTABLE, CheckpointError
from leadline.weights.names import Part, is_experts, is_linear, keeps_float32
from leadline.weights.place import weights_of
from leadline.weights.stored import PLAIN, Quantized, Value
from leadline.weights.target import BF16, CONFIG_SPELLING, SCALES, Form, config_of, form_of, plan, write_weights


def save_checkpoint(
    model: nn.Module,
    config: ModelConfig,
    folder: str | Path,
    *,
    naming: str = "official",
    tokenizer_files: Sequence[str | Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    format: str | None = None,
) -> None:
    """Write all parameters and persistent buffers of `model`, and its `config`, to `folder`.

    naming: one of `names.NAMINGS`. tokenizer_files: copied into the folder under their own names. max_shard_bytes:
    above this the weights are spread over several files. dtype: float32, bfloat16 or float16 for all floating tensors
    except those that the release keeps in float32; None: as they are, in FP8 and FP4 too, so that load(save(model)) is
    bitwise. format: one of `target.FORMATS` instead of a dtype: as a released file of that format, scales included.

    The written config says what the weights are: `torch_dtype` is the dtype of the written embedding, and the fields of
    quantisation are those of the format. Tensors are streamed: beside the model pieces of one matrix are in memory. An
    existing checkpoint at `folder` is replaced once the new one is complete; a folder that holds anything else raises
    FileExistsError. CheckpointError where a format does not fit the model's widths. Nothing half written remains if
    anything fails.
    """
    if dtype is not None and dtype not in CASTABLE:
        raise ValueError(f"weights cannot be saved as {dtype}, only as {', '.join(map(str, CASTABLE))}")
    if dtype is not None and format is not None:
        raise ValueError(f"dtype {dtype} and format {format} exclude each other: give one of them")
    weights = weights_of(model)
    forms = {name: _form(name, weights, dtype, format) for name in weights}
    outputs = plan({name: tuple(weight.shape) for name, weight in weights.items()}, forms, naming)
    config = config_of(config, _announced(forms)).replace(
        torch_dtype=str(forms["embed.weight"].dtype).removeprefix("torch.")
    )

    def read(part: Part) -> Value:
        weight = weights[part.ours]
        whole = weight.detach() if isinstance(weight, Tensor) else weight
        return whole if part.expert is None else whole[part.expert]

    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(config.to_json(CONFIG_SPELLING[naming]), encoding="utf8")
        (temporary / "generation_config.json").write_text(generation_config(config), encoding="utf8")
        for file in map(Path, tokenizer_files):
            _copy_tokenizer_file(file, temporary)
        write_weights(temporary, outputs, read, max_shard_bytes=max_shard_bytes)


def generation_config(config: ModelConfig) -> str:
    """The content of `generation_config.json`. Sampling as released: temperature 1, no truncation."""
    values = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    values |= {name: token for name, token in tokens.items() if token is not None}
    return json.dumps(values, indent=2) + "\n"


def _copy_tokenizer_file(file: Path, folder: Path) -> None:
    if not any(fnmatchcase(file.name, pattern) for pattern in TOKENIZER_FILES):
        raise ValueError(f"{file} is no tokenizer file: its name must match one of {', '.join(TOKENIZER_FILES)}")
    shutil.copyfile(file, folder / file.name)


def _announced(forms: Mapping[str, Form]) -> str:
    """The format that config.json announces for these forms."""
    experts = {form.kind for name, form in forms.items() if is_experts(name)}
    others = {form.kind for name, form in forms.items() if is_linear(name)}
    if len(experts) == len(others) == 1 and (experts == {PLAIN}) == (others == {PLAIN}):
        return BF16 if experts == {PLAIN} else experts.pop()
    raise CheckpointError(
        f"the model holds experts in {' and '.join(sorted(experts))}, others in {' and '.join(sorted(others))}: "
        f"no config.json can announce that, pass a format or a dtype"
    )


def _form(name: str, weights: Mapping[str, Tensor | Quantized], dtype: torch.dtype | None, format: str | None) -> Form:
    weight = weights[name]
    if format is not None:
        found = torch.float32 if isinstance(weight, Quantized) else weight.dtype
        return form_of(name, found, format, SCALES.get(format, torch.float32))
    if dtype is not None:
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            return Form(PLAIN, weight.dtype)
        return Form(PLAIN, torch.float32 if keeps_float32(name) else dtype)
    # The model has wo_a in bfloat16, files that hold its neighbours in FP8 hold it in FP8.
    held = weights[name.replace(".attn.wo_a.", ".attn.wo_b.")]
    if isinstance(held, Quantized):
        return Form(held.format, held.scale.dtype)
    assert isinstance(weight, Tensor)
    return Form(PLAIN, weight.dtype)
