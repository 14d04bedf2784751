"""From a model to a folder that other programs can load.

The folder holds `config.json` in the spelling that belongs to the naming, `generation_config.json`, the weights, and
the tokenizer's files if given. It appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.weights.files import MAX_SHARD_BYTES, CheckpointWriter
from leadline.weights.folder import TOKENIZER_FILES, new_folder
from leadline.weights.header import CASTABLE
from leadline.weights.names import FileTensor, file_tensors, keeps_float32

CONFIG_SPELLING = {
    "official": "official",
    "transformers": "transformers",
    "transformers_saved": "transformers",
}


def save_checkpoint(
    model: nn.Module,
    config: ModelConfig,
    folder: str | Path,
    *,
    naming: str = "official",
    tokenizer_files: Sequence[str | Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write all parameters and persistent buffers of `model`, and its `config`, to `folder`.

    naming: one of `names.NAMINGS`. tokenizer_files: copied into the folder under their own names. max_shard_bytes:
    above this the weights are spread over several files. dtype: float32, bfloat16 or float16 for all floating tensors
    except those that the release keeps in float32; None: as they are, so that load(save(model)) is bitwise.

    `torch_dtype` of the written config is the dtype of the written embedding, and its quantisation fields are left
    out, because the weights are not quantised. Tensors are streamed: beside the model at most one is in memory. An
    existing checkpoint at `folder` is replaced once the new one is complete; a folder that holds anything else raises
    FileExistsError. Nothing half written remains if anything fails.
    """
    if dtype is not None and dtype not in CASTABLE:
        raise ValueError(f"weights cannot be saved as {dtype}, only as {', '.join(map(str, CASTABLE))}")
    tensors: dict[str, Tensor] = model.state_dict()
    expected = file_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, naming)
    dtypes = {name: _dtype_of(name, tensor, dtype) for name, tensor in tensors.items()}
    plan = [(name, dtypes[wanted.parts[0].ours], wanted.shape) for name, wanted in expected.items()]
    config = config.replace(
        torch_dtype=str(dtypes["embed.weight"]).removeprefix("torch."), quantization_config=None, expert_dtype=None
    )
    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(config.to_json(CONFIG_SPELLING[naming]), encoding="utf8")
        (temporary / "generation_config.json").write_text(_generation_config(config), encoding="utf8")
        for file in map(Path, tokenizer_files):
            _copy_tokenizer_file(file, temporary)
        with CheckpointWriter(temporary, plan, max_shard_bytes=max_shard_bytes) as writer:
            for name, info in writer.tensors.items():
                writer.write(name, _pieces(expected[name], tensors, info.dtype))


def _copy_tokenizer_file(file: Path, folder: Path) -> None:
    if not any(fnmatchcase(file.name, pattern) for pattern in TOKENIZER_FILES):
        raise ValueError(f"{file} is no tokenizer file: its name must match one of {', '.join(TOKENIZER_FILES)}")
    shutil.copyfile(file, folder / file.name)


def _dtype_of(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if keeps_float32(name) else dtype


def _pieces(wanted: FileTensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements of a file tensor in row-major order, in pieces no larger than one matrix."""
    parts = [tensors[part.ours] if part.expert is None else tensors[part.ours][part.expert] for part in wanted.parts]
    if len(wanted.shape) < 3:
        yield parts[0].to(dtype)
        return
    # A stack: parts that lie side by side along dimension 1 alternate matrix by matrix.
    for matrices in zip(*parts, strict=True):
        for matrix in matrices:
            yield matrix.to(dtype)


def _generation_config(config: ModelConfig) -> str:
    """Sampling as released: temperature 1, no truncation."""
    values = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    values |= {name: token for name, token in tokens.items() if token is not None}
    return json.dumps(values, indent=2) + "\n"
