"""What a plan is for, and the layout of a stage, in words: the screen and the tables share them."""

from dataclasses import fields
from itertools import groupby

from mist.plans.memory_levels import KEEPS_ALL
from mist.plans.plan import Plan, StagePlan
from mist.plans.workload import MemoryLevel
from mist.platform.quantity import figure_words
from mist.units import format_count


def head_lines(plan: Plan) -> list[str]:
    """Model, cluster, runtime, workload and schedule; figures that the user set."""
    workload, cluster = plan.workload, plan.cluster
    lines = [
        f"{plan.model.name}: {_parameters(plan)} on {cluster.num_gpus} x "
        f"{cluster.device} ({cluster.name}), runtime {plan.runtime}",
        f"sequence {workload.seq_len}, global batch {workload.global_batch} in "
        f"{plan.num_micro_batches} micro-batches (mb), {workload.precision}, {workload.optimizer}, "
        f"attention {workload.attention}{_schedule(plan)}",
    ]
    if plan.overrides:
        own = (f"{name} {figure_words(name, value)}" for name, value in plan.overrides.items())
        lines.append(f"your own figures: {', '.join(own)}")
    return lines


def _schedule(plan: Plan) -> str:
    """The order of micro-batches in a pipeline; "" for one stage."""
    if len(plan.stages) == 1:
        return ""
    chunks = f", {plan.schedule.vpp} chunks per stage" if plan.schedule.vpp > 1 else ""
    return f", schedule {plan.schedule.kind}{chunks}"


def _parameters(plan: Plan) -> str:
    """How many parameters the model has, and how many of them are trained."""
    trained = plan.model.trainable
    words = "" if trained is None else f", {format_count(trained)} of them trained,"
    return f"{format_count(plan.model.params)} parameters{words}"


def data_parallel(stage: StagePlan) -> str:
    """Ranks, or copies of the states x ranks that share one: "16" or "2x8"."""
    copies = stage.dp_replicate
    return str(stage.dp) if copies == 1 else f"{copies}x{stage.dp_shard}"


def level_words(level: MemoryLevel) -> str:
    """What the backward pass repeats at a level: "nothing repeated", "full recomputation"."""
    return "nothing repeated" if level is KEEPS_ALL else f"{level.value} recomputation"


def recomputed(stage: StagePlan) -> str:
    """How many layers are at each level that keeps less than everything."""
    counts = [(level, n) for level, n in stage.memory.items() if n and level is not KEEPS_ALL]
    return ", ".join(f"{n} {level.value}" for level, n in counts) or "none"


def offloaded(stage: StagePlan) -> str:
    """Shares in host memory, equal ones together: "weights, grads 53%, optimizer 38%"."""
    ratios = {item.name: getattr(stage.offload, item.name) for item in fields(stage.offload)}
    shares = [(name, f"{ratio:.0%}") for name, ratio in ratios.items() if ratio]
    words = [
        f"{', '.join(name for name, _ in group)} {share}"
        for share, group in groupby(shares, key=lambda item: item[1])
    ]
    return ", ".join(words) or "nothing"
