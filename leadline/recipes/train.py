"""Pretrain a model from a recipe.

usage: leadline train RECIPE [key=value ...] [--show]

A recipe is a complete run; every field can be replaced: `leadline train nano data=FOLDER minutes=30 out=runs/mine
model.hidden_size=256`. --show prints the resolved run and its parameters and trains nothing.

Ctrl-C saves; the same command continues. The trained model lies in out/checkpoint in the official layout, the numbers
of every step in out/metrics.jsonl. Recipes: nano (two CPU cores, minutes).
"""

from __future__ import annotations

from rich.console import Console

from leadline.cli import INTERRUPTED_STATUS, UsageError, find, resolve, show
from leadline.model.accounting import parameters_active, parameters_total
from leadline.recipes.nano import nano
from leadline.train.pretrain import pretrain

RECIPES = {"nano": nano}


def main(arguments: list[str]) -> int:
    if not arguments:
        raise UsageError(f"name a recipe: one of {', '.join(RECIPES)}")
    recipe, *rest = arguments
    run, wants_show = resolve(find(recipe, RECIPES, "recipe")(), rest)
    if wants_show:
        total, active = parameters_total(run.model), parameters_active(run.model)
        print(f"{show(run)}\nparameters: {total / 1e6:.2f}M, {active / 1e6:.2f}M active per token")
        return 0
    return 0 if pretrain(run, Console()).finished else INTERRUPTED_STATUS
