"""A layout in the words of `mist check`: from its options, or from a text that holds them."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mist.cli.common import app
from mist.errors import InputError
from mist.plans.knobs import TYPED_KNOBS

if TYPE_CHECKING:
    from mist.workflow.calibrating import RunByHand
    from mist.workflow.checking import HandLayout
    from mist.workflow.request import Question


def hand_layout(
    said: Mapping[str, Any], *, model: str, num_gpus: int
) -> "tuple[Question, HandLayout]":
    """What the options of `mist check` ask, by the names of its parameters.

    Raises InputError for what is no layout.
    """
    from mist.workflow.checking import HandLayout, layers_of, offload_of
    from mist.workflow.request import Question, figures_of

    question = Question(
        model=model,
        num_gpus=num_gpus,
        gpu=said["gpu"],
        cluster=said["cluster"],
        runtime=said["runtime"],
        seq_len=said["seq"],
        images=said["images"],
        global_batch=said["global_batch"],
        precision=said["precision"],
        attention=said["attention"],
        margin_ratio=said["margin"],
        overrides=figures_of(said["figures"] or (), said["host_memory"]),
    )
    layout = HandLayout(
        checkpoint=said["checkpoint"],
        schedule=said["schedule"],
        head=said["head"],
        offload=offload_of(said["offload"] or ()),
        layers=layers_of(said["layers"]),
        **{knob.field: said[knob.field] for knob in TYPED_KNOBS},
    )
    return question, layout


def run_by_hand(words: str) -> "RunByHand":
    """A run as `mist check` takes it: "llama3-8b --gpus 8 --zero 3 --micro-batch 1".

    Raises InputError for words without a number of GPUs, or with what `mist check` does not know.
    """
    import typer
    from typer._click.exceptions import UsageError

    from mist.workflow.calibrating import RunByHand

    check = typer.main.get_command(app).commands["check"]  # type: ignore[attr-defined]
    try:
        context = check.make_context("mist check", shlex.split(words))
    except (UsageError, ValueError) as error:  # ValueError: quotes that do not close
        raise InputError(f"mist check {words}: {error}") from None
    said = context.params
    if said["gpus"] is None:
        raise InputError(f"mist check {words}: a model needs --gpus.")
    question, layout = hand_layout(said, model=said["subject"], num_gpus=said["gpus"])
    return RunByHand(words=words, question=question, layout=layout)
