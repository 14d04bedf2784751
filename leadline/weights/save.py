"""From a model to a folder that other programs can load.

The folder holds `config.json` in the spelling that belongs to the naming, `generation_config.json`, the weights, and
the tokenizer's files if given. It appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.weights.files import MAX_SHARD_BYTES
from leadline.weights.folder import TOKENIZER_FILES, new_folder
from leadline.weights.header import CASTABLE
from leadline.weights.names import Part, keeps_float32
from leadline.weights.stored import PLAIN
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
    except those that the release keeps in float32; None: as they are, so that load(save(model)) is bitwise. format: one
    of `target.FORMATS` instead of a dtype: what is a released file of that format, with the scales that it has.

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
    tensors: dict[str, Tensor] = model.state_dict()
    forms = {name: _form(name, tensor, dtype, format) for name, tensor in tensors.items()}
    outputs = plan({name: tuple(tensor.shape) for name, tensor in tensors.items()}, forms, naming)
    config = config_of(config, format or BF16).replace(
        torch_dtype=str(forms["embed.weight"].dtype).removeprefix("torch.")
    )

    def read(part: Part) -> Tensor:
        whole = tensors[part.ours].detach()
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


def _form(name: str, tensor: Tensor, dtype: torch.dtype | None, format: str | None) -> Form:
    if format is not None:
        return form_of(name, tensor.dtype, format, SCALES.get(format, torch.float32))
    if dtype is None or not tensor.is_floating_point():
        return Form(PLAIN, tensor.dtype)
    return Form(PLAIN, torch.float32 if keeps_float32(name) else dtype)
