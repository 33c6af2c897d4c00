"""Modules that call recipes of Megatron-Bridge, and scripts that start one by its name.

A module calls a recipe and then sets fields of its own; `run_recipe.py --recipe NAME
section.field=value` does the same from a shell. Here a call becomes the settings of its recipe, in
the same line, and a script becomes such a module. So one reader reads both, and what stands behind
a recipe overrides it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mist.documents import parse_yaml
from mist.errors import InputError
from mist.export.bridge_recipes import (
    RECIPE,
    BridgeRecipe,
    bridge_recipes,
    refuse_unknown,
    settings_of_recipe,
)
from mist.export.command_words import Options, launched, options_of
from mist.export.megatron_arguments import LAUNCH

CALL: Final = re.compile(r"(?m)^([ \t]*)cfg = (?:\w+\.)*(\w+)\(\)(?=[ \t]*(?:#.*)?$)")
SCRIPT: Final = re.compile(r"(?m)^(?:[^#\n]*\s)?--recipe[\s=]")
PYTHON: Final = re.compile(r"(?m)^[ \t]*(?:import|from|def|cfg)\b")
OVERRIDE: Final = re.compile(r"\+{0,2}([a-z]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
# The length of the data is that of the model in the end: run_recipe.py sets it last.
LENGTH: Final = "dataset.seq_length"
MODEL_LENGTH: Final = "model.seq_length"
OF_NO_ACCOUNT: Final = ("--recipe", "--dataset", "--step_func", "--seq_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeModule:
    """A module with recipes written out.

    Args:
        text: of the module.
        places: the text in which the lines of settings are looked for.
        recipe: the last of them.
        launched: ranks that a script starts, or of the machine of a recipe that stands alone.
        options: of a script, that say nothing of its configuration.
    """

    text: str
    places: str
    recipe: BridgeRecipe | None
    launched: int | None = None
    options: tuple[str, ...] = ()


def names_recipe(text: str) -> bool:
    """Whether a text calls a recipe of the table, or starts one by its name."""
    called = any(found[2] in bridge_recipes() for found in CALL.finditer(text))
    return called or (_is_script(text) and bool(RECIPE.search(text)))


def _is_script(text: str) -> bool:
    # A module may say in a docstring how it is started.
    return bool(SCRIPT.search(text)) and not PYTHON.search(text)


def module_of(text: str, path: str) -> RecipeModule:
    """The module that a module or a script is, with the recipes of the table written out.

    Raises InputError for a script of a recipe that is not in it.
    """
    if _is_script(text):
        options = options_of(text, path)
        module = _module("\n".join(_of_script(options, path)))
        others = tuple(_others(options))
        return replace(module, places=text, launched=launched(options), options=others)
    module = _module(text)
    if module.recipe is not None and RECIPE.fullmatch(path):
        # The recipe alone: it has no lines, and runs on the machine that it was made for.
        return replace(module, places="", launched=module.recipe.num_gpus)
    return module


def _module(text: str) -> RecipeModule:
    called = [bridge_recipes().get(found[2]) for found in CALL.finditer(text)]
    recipe = next((row for row in reversed(called) if row is not None), None)
    text = CALL.sub(_written_out, text)
    return RecipeModule(text=text, places=text, recipe=recipe)


def _written_out(call: re.Match[str]) -> str:
    recipe = bridge_recipes().get(call[2])
    if recipe is None:
        return call[0]
    settings = settings_of_recipe(recipe).items()
    return call[1] + "; ".join(f"cfg.{name} = {value!r}" for name, value in settings)


def _of_script(options: Options, path: str) -> Iterator[str]:
    """The lines of the module that a script is. Raises InputError for an unknown recipe."""
    name = "".join(options.get("--recipe", ())[:1])
    refuse_unknown(name, f"{path}: --recipe {name}")
    yield f"cfg = {name}()"
    for field, value in _overrides(options, path).items():
        yield f"cfg.{field} = {value!r}"


def _others(options: Options) -> Iterator[str]:
    """Options of a script that are listed, with their values."""
    for option, words in options.items():
        if option not in OF_NO_ACCOUNT and not LAUNCH.fullmatch(option):
            own = [word for word in words if not OVERRIDE.fullmatch(word)]
            yield " ".join([option, *own])


def _overrides(options: Options, path: str) -> dict[str, object]:
    """The fields that words of a script set: section.field=value, behind any option."""
    words = [word for values in options.values() for word in values]
    said = {found[1]: found[2] for word in words if (found := OVERRIDE.fullmatch(word))}
    if "--seq_length" in options:
        said[LENGTH] = "".join(options["--seq_length"][:1])
    if MODEL_LENGTH in said and LENGTH not in said:
        raise InputError(
            f"{path}: {MODEL_LENGTH} alone: run_recipe.py sets it to {LENGTH} in the end. Set that."
        )
    if LENGTH in said:
        said[MODEL_LENGTH] = said.pop(LENGTH)
    return {name: _value(value, path) for name, value in said.items()}


def _value(word: str, path: str) -> object:
    """A value as run_recipe.py reads it, which is YAML; text where that is a mapping."""
    found = parse_yaml(word.encode(), Path(path))
    return found if isinstance(found, bool | int | float | str | list | None) else word
