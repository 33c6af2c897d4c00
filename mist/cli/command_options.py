"""Options of the command line that several commands have, or that take lines to say."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from mist.plans.knobs import COUNTED_KNOBS, SEARCHED_KNOBS, TYPED_KNOBS
from mist.plans.objectives import Objective
from mist.plans.search_space import OFFLOADED, SPACES
from mist.plans.workload import (
    Attention,
    HeadMode,
    MemoryLevel,
    Precision,
    ScheduleKind,
    Solver,
)

Arguments = ParamSpec("Arguments")

# Groups of options in the help of a command.
MACHINES = "Machines"
TRAINING = "What is trained, and by what"
SEARCH = "What is searched, and for what"
LAYOUT = "Layout"
OUTPUT = "Files and output"


def with_knobs(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Give a command an option for each knob that a user may type, in place of its `**knobs`."""
    signature = inspect.signature(command)
    *named, _ = signature.parameters.values()
    behind = [parameter.name for parameter in named].index("gpus") + 1
    options = [
        inspect.Parameter(
            knob.field,
            inspect.Parameter.KEYWORD_ONLY,
            default=knob.least,
            annotation=Annotated[
                int, typer.Option(f"--{knob.word}", help=knob.meaning, rich_help_panel=LAYOUT)
            ],
        )
        for knob in TYPED_KNOBS
    ]
    every = [*named[:behind], *options, *named[behind:]]
    # typer reads the signature; Python itself goes on to take any keyword.
    command.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
    return command


Model = Annotated[
    str,
    typer.Argument(help="A Python file with build_model(), a config.json, or a preset."),
]
Subject = Annotated[
    str,
    typer.Argument(
        help="A plan file, a model whose layout the options below give, a file of Megatron, "
        "Megatron-Bridge, torchtitan, DeepSpeed, accelerate, LLaMA-Factory or axolotl, or a "
        "recipe of Megatron-Bridge by name."
    ),
]
GpusOfModel = Annotated[
    int | None,
    typer.Option("--gpus", help="Number of GPUs (for a model).", rich_help_panel=MACHINES),
]
Gpus = Annotated[
    str,
    typer.Option(
        "--gpus",
        help="Number of GPUs, or several to choose from: 8,16 or 8..64.",
        rich_help_panel=MACHINES,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="Device profile, for instance h100-sxm; mist profiles lists them.",
        rich_help_panel=MACHINES,
    ),
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Cluster profile (mist profiles lists them) or YAML file.",
        rich_help_panel=MACHINES,
    ),
]
ClusterNames = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Cluster profile (mist profiles lists them) or YAML file, or several: a,b.",
        rich_help_panel=MACHINES,
    ),
]
ObjectiveName = Annotated[
    Objective,
    typer.Option(
        "--objective", help="What the best plan is, and the best GPUs.", rich_help_panel=SEARCH
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        min=0.0,
        max=1.0,
        help="Slower than the fastest by this share at most, to lose less where a figure is wrong.",
        rich_help_panel=SEARCH,
    ),
]
Price = Annotated[
    str | None,
    typer.Option(
        "--price",
        help="USD per GPU hour [the cluster's]; or one for each cluster: 2,3.",
        rich_help_panel=MACHINES,
    ),
]
Tokens = Annotated[
    float | None,
    typer.Option(
        "--tokens", help="Tokens to train on: days and dollars for them.", rich_help_panel=SEARCH
    ),
]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime", help="Training framework; mist profiles lists them.", rich_help_panel=TRAINING
    ),
]
Seq = Annotated[
    int | None,
    typer.Option("--seq", help="Tokens per sample [min(8192, model's)].", rich_help_panel=TRAINING),
]
Images = Annotated[
    int | None,
    typer.Option(
        "--images",
        min=0,
        help="Images per sample of a vision-language model; 0: text only [1].",
        rich_help_panel=TRAINING,
    ),
]
GlobalBatch = Annotated[
    int,
    typer.Option("--global-batch", help="Samples per optimizer step.", rich_help_panel=TRAINING),
]
PrecisionName = Annotated[
    Precision, typer.Option("--precision", help="Compute precision.", rich_help_panel=TRAINING)
]
AttentionName = Annotated[
    Attention, typer.Option("--attention", help="Attention kernel.", rich_help_panel=TRAINING)
]
Margin = Annotated[
    float | None,
    typer.Option(
        "--margin",
        help="Share of device memory that stays free [P(fits) of 98%: 0.142 for torch].",
        rich_help_panel=MACHINES,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        help="Host memory of one node (64GB) [the cluster's].",
        rich_help_panel=MACHINES,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        help=f"Recomputed layers: {', '.join(MemoryLevel)}, a number, or one of each stage: 3,1.",
        rich_help_panel=LAYOUT,
    ),
]
HeadName = Annotated[
    HeadMode,
    typer.Option(
        "--head",
        help="How the last matrix and the loss run: all logits at once, or a part at a time.",
        rich_help_panel=LAYOUT,
    ),
]
Details = Annotated[
    bool,
    typer.Option(
        "--details",
        help="Print every part, other layout, source and note as well; --json always has them.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", readable=False, help="Plan file to write (.yaml).", rich_help_panel=OUTPUT
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace a file of another kind at the output's place.",
        rich_help_panel=OUTPUT,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the Python file that PLAN names, wherever it lies.",
        rich_help_panel=OUTPUT,
    ),
]
ModelOfPlan = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="The model of the file [what a plan names]."),
]
Space = Annotated[
    str,
    typer.Option(
        "--space", help=f"What to search: one of {', '.join(SPACES)}.", rich_help_panel=SEARCH
    ),
]
Fixed = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help=f"Fix a knob (tp=2): {', '.join(SEARCHED_KNOBS)}, checkpoint, schedule; or a figure "
        "of a profile (cluster.host_memory_bytes=64GB).",
        rich_help_panel=SEARCH,
    ),
]
Figures = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A figure of a profile (cluster.host_memory_bytes=64GB); mist profiles show NAME "
        "lists them.",
        rich_help_panel=MACHINES,
    ),
]
Most = Annotated[
    list[str] | None,
    typer.Option(
        "--max",
        help=f"Limit a knob (pp=8): {', '.join(COUNTED_KNOBS)}; or ratios (offload=0.5): offload "
        f"for all, {', '.join(OFFLOADED)}.",
        rich_help_panel=SEARCH,
    ),
]
Forbid = Annotated[
    list[str] | None,
    typer.Option(
        "--forbid",
        help="Leave out offload or part of it, a level, a schedule, unlike-stages, unequal-meshes.",
        rich_help_panel=SEARCH,
    ),
]
SolverName = Annotated[
    Solver,
    typer.Option(
        "--solver", help="Exact dynamic program, MILP, or one by the other.", rich_help_panel=SEARCH
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option("--time-limit", min=0.0, help="CPU seconds of searching.", rich_help_panel=SEARCH),
]
Top = Annotated[
    int, typer.Option("--top", min=0, help="Alternatives to report.", rich_help_panel=SEARCH)
]
Offloads = Annotated[
    list[str] | None,
    typer.Option(
        "--offload",
        help=f"Share in host memory (optimizer=0.5) of {', '.join(OFFLOADED)}.",
        rich_help_panel=LAYOUT,
    ),
]
ScheduleName = Annotated[
    ScheduleKind,
    typer.Option(
        "--schedule", help="Order of micro-batches in the pipeline.", rich_help_panel=LAYOUT
    ),
]
LayerSplit = Annotated[
    str,
    typer.Option(
        "--layers",
        help="Layers of each stage (9,8,8,7), or of each chunk in the order of the layers "
        "[the runtime's own split].",
        rich_help_panel=LAYOUT,
    ),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Say what binds, what more of it would bring, and what each part of the search is "
        "worth: some ten searches more, and a picture.",
        rich_help_panel=OUTPUT,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Dry-run the winner; plan again if it does not fit.",
        rich_help_panel=SEARCH,
    ),
]
