"""Recipes of Megatron-Bridge by name: what each sets, of `profiles/bridge_recipes.yaml`.

A recipe is a function that returns a configuration. A module calls it and then sets fields of its
own; `run_recipe.py --recipe NAME section.field=value` does the same from a shell. Here a call
becomes the settings of its recipe, in the same line, and a script becomes such a module. So one
reader reads both, and what stands behind a recipe overrides it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Literal

from mist.documents import parse_yaml
from mist.errors import InputError, did_you_mean
from mist.export.command_words import Options, launched, options_of
from mist.export.megatron_arguments import LAUNCH
from mist.plans.provenance import Kind
from mist.platform.profiles import load_shipped
from mist.platform.quantity import Record

RECIPE: Final = re.compile(r"\w+_(?:pretrain|sft|peft|finetune)\w*_config")
CALL: Final = re.compile(r"(?m)^([ \t]*)cfg = (?:\w+\.)*(\w+)\(\)(?=[ \t]*(?:#.*)?$)")
SCRIPT: Final = re.compile(r"(?<![\w-])--recipe[\s=]")
OVERRIDE: Final = re.compile(r"\+{0,2}([a-z]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
# The length of the data is that of the model in the end: run_recipe.py sets it last.
LENGTH, MODEL_LENGTH = "dataset.seq_length", "model.seq_length"
OF_NO_ACCOUNT: Final = ("--recipe", "--dataset", "--step_func", "--seq_length")

SettingValue = bool | int | str | None
COLUMNS: Final = {
    "tp": "model.tensor_model_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "vpp": "model.virtual_pipeline_model_parallel_size",
    "cp": "model.context_parallel_size",
    "sp": "model.sequence_parallel",
    "micro_batch": "train.micro_batch_size",
    "global_batch": "train.global_batch_size",
    "seq_len": MODEL_LENGTH,
}
"""Columns of the table and the fields of the configuration that they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeRecipe(Record):
    """A row: degrees, batches [sequences] and length [tokens] that a recipe sets.

    Args:
        alias: the short name of the same function.
        model: a preset of the same sizes, or the name on the hub where there is none.
        vpp: chunks of a stage; None where they are not interleaved.
        more: other fields by name, as Megatron-Bridge has them.
    """

    name: str
    model: str
    tp: int
    pp: int
    cp: int
    sp: bool
    micro_batch: int
    global_batch: int
    seq_len: int
    alias: str | None = None
    vpp: int | None = None
    more: Mapping[str, SettingValue] = field(default_factory=dict)

    @property
    def num_gpus(self) -> int | None:
        """Of the machine that the recipe is for, where its name says it."""
        said = re.search(r"_(\d+)gpu_", self.name)
        return int(said[1]) if said else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeRecipes(Record):
    """The table. `common`: fields that all rows set."""

    schema: Literal["mist.recipes/1"]
    source: str
    kind: Kind
    common: Mapping[str, SettingValue]
    recipes: tuple[BridgeRecipe, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeModule:
    """A module with recipes written out; the last of them, and the ranks that are started.

    `places`: the text in which the lines of settings are looked for.
    """

    text: str
    places: str
    recipe: BridgeRecipe | None
    launched: int | None


@cache
def bridge_recipes() -> Mapping[str, BridgeRecipe]:
    """The rows by name and by alias."""
    rows = _table().recipes
    return {row.name: row for row in rows} | {row.alias: row for row in rows if row.alias}


@cache
def _table() -> BridgeRecipes:
    return load_shipped("bridge_recipes.yaml", BridgeRecipes)


def recipe_text(name: str) -> str | None:
    """The module that is the recipe of that name alone; None for what is no name of a recipe.

    Raises InputError for a recipe that is not in the table.
    """
    if not RECIPE.fullmatch(name):
        return None
    _refuse_unknown(name)
    return f"cfg = {name}()\n"


def _refuse_unknown(name: str) -> None:
    known = bridge_recipes()
    if name not in known:
        raise InputError(
            f"{name}: the defaults of this recipe of Megatron-Bridge are not known, and its code "
            f"is not run. {did_you_mean(name, known)} Or put the function into a file, without "
            "other recipes, and give that: mist check recipe.py MODEL --gpus N."
        )


def names_recipe(text: str) -> bool:
    """Whether a text calls a recipe of the table, or starts one by its name."""
    called = any(found[2] in bridge_recipes() for found in CALL.finditer(text))
    return called or (bool(SCRIPT.search(text)) and bool(RECIPE.search(text)))


def module_of(text: str, path: str) -> RecipeModule:
    """The module that a module or a script is, with the recipes of the table written out.

    Raises InputError for a script of a recipe that is not in it.
    """
    ranks, places = None, text
    if SCRIPT.search(text):
        options = options_of(text, path)
        ranks, text = launched(options), "\n".join(_of_script(options, path))
    else:
        # The name of a recipe has no lines; settings of a call stand in the line of the call.
        places = "" if RECIPE.fullmatch(path) else CALL.sub(_written_out, text)
    called = [bridge_recipes().get(found[2]) for found in CALL.finditer(text)]
    recipe = next((row for row in reversed(called) if row is not None), None)
    return RecipeModule(
        text=CALL.sub(_written_out, text),
        places=places,
        recipe=recipe,
        launched=ranks or (recipe.num_gpus if recipe else None),
    )


def _written_out(call: re.Match[str]) -> str:
    recipe = bridge_recipes().get(call[2])
    if recipe is None:
        return call[0]
    columns = {name: getattr(recipe, column) for column, name in COLUMNS.items()}
    settings = {**_table().common, **columns, **recipe.more}
    return call[1] + "; ".join(f"cfg.{name} = {value!r}" for name, value in settings.items())


def _of_script(options: Options, path: str) -> Iterator[str]:
    """The lines of the module that a script is. Raises InputError for an unknown recipe."""
    name = "".join(options["--recipe"][:1])
    _refuse_unknown(name)
    yield f"cfg = {name}()"
    for name, value in _overrides(options, path).items():
        yield f"cfg.{name} = {value!r}"
    for option, words in options.items():
        if option not in OF_NO_ACCOUNT and not LAUNCH.fullmatch(option):
            yield f"cfg.{option.lstrip('-').replace('-', '_')} = {' '.join(words)!r}"


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
