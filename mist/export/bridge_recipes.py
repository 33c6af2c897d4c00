"""Recipes of Megatron-Bridge by name: what each sets, of `profiles/bridge_recipes.yaml`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Literal

from mist.errors import InputError, did_you_mean
from mist.platform.profiles import load_shipped
from mist.platform.quantity import Record

RECIPE: Final = re.compile(r"\b\w{1,80}_(?:pretrain|sft|peft|finetune)\w{0,80}_config\b")

SettingValue = bool | int | str | None
COLUMNS: Final = {
    "tp": "model.tensor_model_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "vpp": "model.virtual_pipeline_model_parallel_size",
    "cp": "model.context_parallel_size",
    "sp": "model.sequence_parallel",
    "micro_batch": "train.micro_batch_size",
    "global_batch": "train.global_batch_size",
    "seq_len": "model.seq_length",
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
    common: Mapping[str, SettingValue]
    recipes: tuple[BridgeRecipe, ...]


@cache
def bridge_recipes() -> Mapping[str, BridgeRecipe]:
    """The rows by name and by alias."""
    rows = _table().recipes
    return {row.name: row for row in rows} | {row.alias: row for row in rows if row.alias}


@cache
def _table() -> BridgeRecipes:
    return load_shipped("bridge_recipes.yaml", BridgeRecipes)


def settings_of_recipe(recipe: BridgeRecipe) -> dict[str, SettingValue]:
    """The fields that a recipe sets, by name without `cfg.`."""
    columns = {name: getattr(recipe, column) for column, name in COLUMNS.items()}
    return {**_table().common, **columns, **recipe.more}


def recipe_text(name: str) -> str | None:
    """The module that is the recipe of that name alone; None for what is no name of a recipe.

    Raises InputError for a recipe that is not in the table.
    """
    if not RECIPE.fullmatch(name):
        return None
    refuse_unknown(name, f"mist check {name}")
    return f"cfg = {name}()\n"


def refuse_unknown(name: str, asked: str) -> None:
    """Raise InputError for a recipe that is not in the table, with the nearest names.

    `asked`: where the name stands, as the message begins.
    """
    known = bridge_recipes()
    if name not in known:
        raise InputError(
            f"{asked}: the defaults of this recipe of Megatron-Bridge are not known, and its code "
            f"is not run. {did_you_mean(name, known)} Or put the function into a file, without "
            "other recipes, and give that: mist check recipe.py MODEL --gpus N."
        )
