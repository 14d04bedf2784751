"""The model of a checkpoint for the verbs that run one: device, dtype and cache format by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from leadline.model.cache_format import CACHE_FORMATS
from leadline.model.transformer import Transformer
from leadline.weights.load import load_checkpoint

CacheName = Literal["exact", "served", "packed"]
DtypeName = Literal["file", "float32", "bfloat16", "float16"]
DTYPES = {"file": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(folder: Path, *, device: str, dtype: DtypeName, cache: CacheName, with_mtp: bool) -> Transformer:
    """Load a folder. device: a name of torch's, or "auto" for the GPU if there is one. dtype: "file" keeps that of the
    files, quantised weights included."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_checkpoint(folder, device, DTYPES[dtype], with_mtp=with_mtp)
    model.cache_format = CACHE_FORMATS[cache]
    return model
