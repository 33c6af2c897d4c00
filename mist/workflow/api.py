"""The Python API: `mist.plan` and `mist.check`, with the names and defaults of the command line."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, Unpack

from mist.errors import InputError, did_you_mean
from mist.plans.knobs import TYPED_KNOBS
from mist.plans.objectives import Objective
from mist.plans.plan import Plan
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.search_space import DEFAULT, SearchSpace, narrowed, space_of
from mist.plans.workload import Attention, HeadMode, Precision, ScheduleKind, Solver
from mist.platform.overrides import knobs_and_figures
from mist.search.robust_choice import DEFAULT_TOLERANCE_RATIO
from mist.symbolic.load_programs import Progress, quiet
from mist.workflow.checking import (
    Checked,
    HandLayout,
    check_layout,
    check_plan,
    layers_of,
    offload_of,
)
from mist.workflow.cluster_choice import offer_of, rent
from mist.workflow.plan_model import ModelAccess
from mist.workflow.planning import Effort
from mist.workflow.request import DEFAULT_GLOBAL_BATCH, Question, figures_of

if TYPE_CHECKING:
    from torch import nn


class Options(TypedDict, total=False):
    """What may be said beside the model and the number of GPUs.

    gpu, cluster, runtime: profile names (None: the device's or cluster's own; "torch").
    seq: tokens per sample (None: min(8192, the model's maximum)). images: of a sample of a model
    that looks at images (None: one; 0: text only). global_batch: samples per step.
    precision: "bf16", "fp16" or "fp32". attention: "flash" or "math". margin: share of the device
    memory that stays free (None: the runtime's). host_memory: of one node, "31GB" or bytes (None:
    the cluster's). set: figures of profiles, ["cluster.host_memory_bytes=64GB"]. make_batch, loss:
    for a module whose input is not token ids; see `mist.trace.trace_model`.
    """

    gpu: str | None
    cluster: str | None
    runtime: str
    seq: int | None
    images: int | None
    global_batch: int
    precision: str
    attention: str
    margin: float | None
    host_memory: str | float | None
    set: Sequence[str]
    make_batch: Callable[..., object] | None
    loss: Callable[..., object] | None


Model: TypeAlias = "str | os.PathLike[str] | nn.Module"


class LayoutOptions(Options, total=False):
    """A layout as `mist check` takes it: see `HandLayout`.

    offload: ratios by state, {"optimizer": 0.5}, or as the command's words, ["optimizer=0.5"].
    schedule: "gpipe", "1f1b", "interleaved" or "zero-bubble". vpp: chunks per stage. layers: of
    each stage, or chunk, [9, 8, 8, 7] or "9,8,8,7" (none: the runtime's own split). trust: with a
    plan file, run the Python file that it names wherever it lies.
    """

    tp: int
    pp: int
    zero: int
    dp_replicate: int
    micro_batch: int
    checkpoint: str
    offload: Mapping[str, float] | Sequence[str]
    schedule: str
    head: str
    vpp: int
    layers: Sequence[int] | str
    trust: bool


class PlanOptions(Options, total=False):
    """What chooses among plans, and narrows them: see the options of `mist plan`.

    objective: "throughput", "nominal", "memory", "tokens-per-dollar" or "time-to-tokens".
    tolerance: how much slower than the fastest a robust plan may be (0.03). price: USD per GPU hour
    (None: the cluster's profile). tokens: to train on. `cluster` may be several, "a,b".
    set (also of knobs), max, forbid: as the command's words, ["tp=2"], ["offload=0.5"],
    ["interleaved"]. solver: "dp", "milp" or "both". time_limit: CPU seconds of searching.
    """

    objective: str
    tolerance: float
    price: float | None
    tokens: float | None
    max: Sequence[str]
    forbid: Sequence[str]
    solver: str
    time_limit: float


def plan(
    model: Model,
    *,
    gpus: int | str,
    space: SearchSpace | str | None = None,
    top: int = 5,
    progress: Progress = quiet,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Search the best way to train a model that fits.

    Args:
        model: a path (model file, config.json), a preset name, or a module on any device.
        gpus: number of GPUs, or several to choose from: "8,16" or "8..64".
        space: what to search, by its name or in detail; None for all that the runtime can do.
        top: how many alternatives to report.
        progress: called with a line of text now and then.
        options: see `Options` and `PlanOptions`.

    Returns:
        The plan, with its estimate, alternatives and provenance.

    Raises:
        InputError: something in the question cannot be used.
        Infeasible: nothing fits.
    """
    _known_only(options, PlanOptions)
    price = options.get("price")
    offer = offer_of(
        str(gpus),
        options.get("cluster"),
        None if price is None else str(price),
        options.get("tokens"),
    )
    effort = Effort(
        objective=_choice("objective", options.get("objective", "throughput"), Objective),
        tolerance_ratio=options.get("tolerance", DEFAULT_TOLERANCE_RATIO),
        num_alternatives=top,
        progress=progress,
        time_limit_s=options.get("time_limit", math.inf),
        method=_choice("solver", options.get("solver", "both"), Solver).value,
    )
    knobs, figures = knobs_and_figures(options.get("set", ()))
    allowed = narrowed(
        space_of(space) if isinstance(space, str) else space or space_of(DEFAULT),
        fixed=knobs,
        most=options.get("max", ()),
        forbid=options.get("forbid", ()),
    )
    return rent(_question(model, 1, options, figures), offer, allowed, effort).planned.plan


def check(
    model: Model,
    *,
    gpus: int | None = None,
    progress: Progress = quiet,
    **options: Unpack[LayoutOptions],
) -> Checked:
    """Judge a plan file (gpus not given), or a layout of a model on `gpus` GPUs.

    Args:
        model: a plan file; or a model as in `plan`.
        gpus: number of GPUs; None when `model` is a plan file.
        progress: called with a line of text now and then.
        options: see `Options` and `LayoutOptions`; with a plan file only `margin`,
            `host_memory`, `set` and `trust`.

    Returns:
        `fits`, `margin_bytes`, the plan with its estimate, notes and suggestions.

    Raises:
        InputError: something in the question cannot be used, or a rule is broken.
    """
    _known_only(options, LayoutOptions)
    if gpus is None:
        if not isinstance(model, str | os.PathLike):
            raise InputError("a module needs gpus=N.")
        return _check_plan(os.fspath(model), options, progress)
    question = _question(model, gpus, options, options.get("set", ()))
    return check_layout(question, _layout(options), progress=progress)


def _layout(options: LayoutOptions) -> HandLayout:
    layers, offload = options.get("layers", ()), options.get("offload", ())
    if isinstance(offload, Mapping):
        offload = [f"{name}={ratio}" for name, ratio in offload.items()]
    said: Mapping[str, Any] = options
    numbers = {knob.field: said[knob.field] for knob in TYPED_KNOBS if knob.field in said}
    return HandLayout(
        **numbers,
        checkpoint=options.get("checkpoint", "none"),
        schedule=_choice("schedule", options.get("schedule", DEFAULT_KIND), ScheduleKind),
        head=_choice("head", options.get("head", HeadMode.NONE), HeadMode),
        offload=offload_of(offload),
        layers=layers_of(layers) if isinstance(layers, str) else tuple(layers),
    )


def _check_plan(path: str, options: LayoutOptions, progress: Progress) -> Checked:
    if not path.endswith((".yaml", ".yml")):
        raise InputError(f"{path} is no plan file (.yaml), and a model needs gpus=N.")
    said = sorted(set(options) - {"margin", "host_memory", "set", "trust"})
    if said:
        raise InputError(f"{path} says itself what {', '.join(said)} would; leave them out.")
    return check_plan(
        path,
        margin_ratio=options.get("margin"),
        overrides=figures_of(options.get("set", ()), options.get("host_memory")),
        access=ModelAccess(trust=options.get("trust", False)),
        progress=progress,
    )


def _known_only(options: Mapping[str, object], shape: type) -> None:
    """Python does not check the keywords of a TypedDict: a misspelt one must not be ignored."""
    known = shape.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}. {did_you_mean(name, known)}")


Choice = TypeVar("Choice", bound=StrEnum)


def _choice(name: str, value: str, choices: type[Choice]) -> Choice:
    if value not in set(choices):
        allowed = ", ".join(choices)
        raise InputError(f"{name} {value!r} is none of {allowed}.")
    return choices(value)


def _question(model: Model, gpus: int, options: Options, figures: Iterable[str]) -> Question:
    return Question(
        model=os.fspath(model) if isinstance(model, str | os.PathLike) else model,
        num_gpus=gpus,
        gpu=options.get("gpu"),
        cluster=options.get("cluster"),
        runtime=options.get("runtime", "torch"),
        seq_len=options.get("seq"),
        global_batch=options.get("global_batch", DEFAULT_GLOBAL_BATCH),
        precision=_choice("precision", options.get("precision", "bf16"), Precision),
        attention=_choice("attention", options.get("attention", "flash"), Attention),
        margin_ratio=options.get("margin"),
        overrides=figures_of(figures, options.get("host_memory")),
        images=options.get("images"),
        make_batch=options.get("make_batch"),
        loss=options.get("loss"),
    )
