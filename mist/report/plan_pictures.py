"""Pictures that a plan file alone gives: where stages are, their layers, memory, and the step.

Numbers are those that the screen prints: `step_parts` and the estimate of each stage.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Final

from mist.plans.breakdown import PART_NAMES, ROUNDING_RATIO, step_parts
from mist.plans.plan import Limits, Plan, StagePlan
from mist.report.pictures import HALF_ROW, Picture, Shape, end_to_end, row_rect
from mist.report.plan_words import data_parallel, level_words, offloaded
from mist.units import GIB, format_bytes, format_seconds

MEMORY_NAMES: Final = {
    "states": "states (weights, gradients, optimizer)",
    "activations": "activations",
    "working": "working memory",
    "gathered": "gathered weights",
    "buffers": "communication buffers",
    "allocator": "allocator",
}


def plan_pictures(plan: Plan, limits: Limits) -> tuple[Picture, ...]:
    """Devices, layers, memory and the waterfall of a step."""
    return (devices(plan), layers(plan), memory(plan, limits), waterfall(plan))


def stage_names(plan: Plan) -> tuple[str, ...]:
    """Of the rows of pictures."""
    return tuple(f"stage {index}" for index in range(len(plan.stages)))


def devices(plan: Plan) -> Picture:
    """Stages by GPUs: which hold what, node by node."""
    shapes = []
    per_node = plan.cluster.gpus_per_node
    for row, stage in enumerate(plan.stages):
        first, count = stage.devices
        for gpu, size in _in_nodes(first, count, per_node):
            words = f"stage {row}: GPUs {gpu} to {gpu + size - 1}, {_mesh(stage)}"
            shapes.append(row_rect(row, (gpu, gpu + size), f"node {gpu // per_node}", words))
        middle = first + count / 2
        shapes.append(Shape(kind="text", series="mesh", x1=middle, y1=row, words=_mesh(stage)))
    return Picture(
        name="devices",
        title="Stages and GPUs",
        caption="Each row is a stage of the pipeline; across, the GPUs that it has, by node.",
        x_label="GPU",
        row_names=stage_names(plan),
        shapes=tuple(shapes),
    )


def _in_nodes(first: int, count: int, per_node: int) -> Iterator[tuple[int, int]]:
    """Runs of GPUs [first, count] that lie in one node."""
    gpu = first
    while gpu < first + count:
        size = min(per_node - gpu % per_node, first + count - gpu)
        yield gpu, size
        gpu += size


def _mesh(stage: StagePlan) -> str:
    return f"dp {data_parallel(stage)} x tp {stage.tp}, ZeRO-{stage.zero}"


def layers(plan: Plan) -> Picture:
    """Stages by layers: what of each layer's activations is kept."""
    shapes: list[Shape] = []
    for row, stage in enumerate(plan.stages):
        places = [x for first, count in stage.layers for x in range(first, first + count)]
        both = enumerate(zip(places, stage.levels, strict=True))
        # Neighbours at one level are one bar; a gap between chunks begins another.
        for (_, level), run in groupby(both, key=lambda item: (item[1][0] - item[0], item[1][1])):
            own = [place for _, (place, _) in run]
            span = (own[0], own[-1] + 1)
            words = f"stage {row}: layers {own[0]} to {own[-1]}, {level_words(level)}"
            shapes.append(row_rect(row, span, level_words(level), words))
        if (hosted := offloaded(stage)) != "nothing":
            middle = sum(places) / len(places) + 0.5
            words = f"on the host: {hosted}"
            shapes.append(Shape(kind="text", series="host", x1=middle, y1=row, words=words))
    return Picture(
        name="layers",
        title="Layers of each stage",
        caption="Across, the layers of the model; the colour says what the backward pass repeats.",
        x_label="layer",
        row_names=stage_names(plan),
        shapes=tuple(shapes),
    )


def memory(plan: Plan, limits: Limits) -> Picture:
    """The peak of each stage by part, against what a plan may use and what the card has."""
    shapes: list[Shape] = []
    for row, stage in enumerate(plan.estimate.stages):
        parts = [
            (
                MEMORY_NAMES[name],
                size / GIB,
                f"stage {row}: {MEMORY_NAMES[name]} {format_bytes(size)}",
            )
            for name, size in stage.memory_parts_bytes.items()
            if size
        ]
        shapes += end_to_end(row, parts)
    shapes += limit_lines(plan, limits)
    return Picture(
        name="memory",
        title="Memory of each GPU at its peak",
        caption="Predicted bytes by part. The lines are what a plan may use, and the usable "
        "memory of the card.",
        x_label="memory per GPU [GiB]",
        row_names=stage_names(plan),
        shapes=tuple(shapes),
    )


def limit_lines(plan: Plan, limits: Limits, axis: str = "x") -> list[Shape]:
    """What a plan may use and what the card has, across an axis of GiB."""
    rows = [
        ("a plan may use", limits.device_bytes),
        ("usable on the card", float(plan.estimate.stages[0].usable_bytes)),
    ]
    return [
        Shape(
            kind="limit",
            series=name,
            words=f"{name}: {format_bytes(size)}",
            x1=size / GIB if axis == "x" else math.nan,
            y1=size / GIB if axis == "y" else math.nan,
        )
        for name, size in rows
    ]


def waterfall(plan: Plan) -> Picture:
    """From a step at the peak rate of the matrix units to the predicted step, part by part."""
    estimate = plan.estimate
    parts = step_parts(estimate, plan.num_micro_batches)
    ideal_s = estimate.mfu * estimate.step_s
    steps = {
        "at the peak rate": ideal_s,
        "kernels below the peak rate": parts.pop("compute") - ideal_s,
    }
    steps |= {
        PART_NAMES[part]: s
        for part, s in parts.items()
        if abs(s) > ROUNDING_RATIO * estimate.step_s
    }
    shapes, start = [], 0.0
    for row, (name, s) in enumerate(steps.items()):
        series = "ideal" if row == 0 else "lost"
        words = f"{name}: {format_seconds(s)} ({s / estimate.step_s:.1%} of the step)"
        shapes.append(row_rect(row, (start, start + s), series, words))
        start += s
    words = f"predicted step: {format_seconds(estimate.step_s)}"
    shapes.append(row_rect(len(steps), (0.0, estimate.step_s), "predicted", words))
    sure = estimate.uncertainty
    low_s, high_s = (estimate.step_s * r for r in (sure.step_low_ratio, sure.step_high_ratio))
    shapes.append(
        Shape(
            kind="rect",
            series="interval of the measured step",
            x1=low_s,
            x2=high_s,
            y1=len(steps) - HALF_ROW / 4,
            y2=len(steps) + HALF_ROW / 4,
            words=f"interval of the measured step: {format_seconds(low_s)} to "
            f"{format_seconds(high_s)}",
        )
    )
    return Picture(
        name="waterfall",
        title="From the ideal step to the predicted one",
        caption="The ideal: all model FLOPs at the peak rate of the GPUs. Each row below adds what "
        "the slowest stage loses.",
        x_label="seconds of a step",
        row_names=(*steps, "predicted step"),
        shapes=tuple(shapes),
    )
