"""The `nano` run: every part of DeepSeek-V4, pretrained on two CPU cores in minutes."""

from __future__ import annotations

from pathlib import Path

from leadline.model.config import NANO
from leadline.train.pretrain import Run


def nano(out: Path = Path("runs/nano")) -> Run:
    """Five minutes of pretraining on real text."""
    return Run(out=out, model=NANO)
