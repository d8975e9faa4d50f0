"""``allears train``: run a recipe."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import tyro


@dataclass
class Train:
    """Train a model with one of the recipes, or go on with a run that was stopped."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Name of the recipe."""
    out: str
    """Folder for checkpoints, log, curves and weights; a run that is there is resumed."""
    corpus: tuple[str, ...] = ()
    """Folders of prepared corpora."""
    minutes: float | None = None
    """Time in all, over every resumed call."""
    steps: int | None = None
    """Optimiser steps in all."""
    device: str = "auto"
    """auto, cpu or cuda."""
    preset: str | None = None
    """Size of the model; the recipe's own choice if not given."""
    seed: int = 0
    """Seed of every draw."""
    set: tuple[str, ...] = ()
    """Other settings of the recipe as NAME=VALUE, VALUE in JSON or plain text."""

    def run(self) -> int:
        recipe = find_recipe(self.recipe)
        given: dict[str, Any] = {"minutes": self.minutes, "steps": self.steps, "device": self.device, "seed": self.seed}
        if self.preset is not None:
            given["preset"] = self.preset
        overrides = dict(parse_setting(text) for text in self.set)
        if twice := sorted({*given, "corpus", "out", "preset"} & set(overrides)):
            raise ValueError(f"--set: {twice[0]} has an option of its own; use --{twice[0]}")
        if not logging.getLogger().handlers:
            logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("allears").setLevel(logging.INFO)
        result = recipe(corpus=list(self.corpus), out=self.out, **given, **overrides)
        print(f"step {result.step}, {result.elapsed_s / 60:.1f} min, ended by {result.stop}; weights: {result.weights}")
        for name, value in result.metrics.items():
            print(f"  {name} {value:.4g}")
        return 0


def find_recipe(name: str) -> Callable[..., Any]:
    """The recipe of that name; an entry ``module:function`` is imported now.

    Raises:
        ValueError: there is none.
    """
    from allears.recipes import RECIPES

    if name not in RECIPES:
        raise ValueError(f"recipe: {name!r} is unknown; there are {', '.join(sorted(RECIPES)) or 'none'}")
    entry: Any = RECIPES[name]
    if isinstance(entry, str):
        module, _, function = entry.partition(":")
        entry = getattr(import_module(module), function)
    return entry


def parse_setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` as (name, value): numbers, true, false, null, lists from JSON; anything else is text.

    Raises:
        ValueError: there is no ``=``, or no name.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set: got {text!r}, wanted NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


COMMAND = Train
