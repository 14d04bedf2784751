"""Save and resume, exactly: after a resume every following number is bitwise what it would have been.

A training checkpoint is one file that holds everything the next step depends on: parameters and buffers, both
optimisers, the place in the data, the random generator, the step, and what was decided at the start. It appears in one
move, so a run killed while writing keeps the file before. (A checkpoint for other programs is
`weights.save.save_checkpoint`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leadline.train.atomic import replacing

_VERSION = 1


class ResumeError(ValueError):
    """A training checkpoint cannot be used; one line that names the file, what was found and what to do."""


def save_training(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    run: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Write a training checkpoint. run: the settings that a resume must share. progress: whatever else is needed."""
    content = {
        "version": _VERSION,
        "run": dict(run),
        "progress": dict(progress),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": torch.get_rng_state(),
    }
    with replacing(path) as file:
        torch.save(content, file)


def load_training(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, run: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore model, optimisers and random generator from a training checkpoint; returns its `progress`.

    Raises ResumeError when the file is damaged, or belongs to a run with other settings than `run`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResumeError(f"{path}: cannot be read ({reason}); delete it to start the run again") from None
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ResumeError(f"{path}: not a training checkpoint of version {_VERSION}; delete it to start the run again")
    stored = content["run"]
    for name, value in run.items():
        if stored.get(name) != value:
            raise ResumeError(
                f"{path}: was made with {name} = {stored.get(name)!r}, this run has {value!r}; use the same settings, "
                "or another folder (out=...)"
            )
    model.load_state_dict(content["model"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(content["generator"])
    return content["progress"]
