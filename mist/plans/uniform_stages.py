"""Layouts from knobs: one stage of a pipeline, and pipelines whose stages differ in layers only."""

from collections.abc import Mapping, Sequence
from typing import Any

from mist.plans.knobs import AT_REST, STAGE_KNOBS
from mist.plans.plan import NOTHING_OFFLOADED, Layout, Offload, Schedule, StagePlan
from mist.plans.workload import MemoryLevel

Runs = tuple[tuple[int, int], ...]
Memory = Mapping[MemoryLevel, int]


def stage_at(  # noqa: PLR0913 - what makes a stage
    knobs: Mapping[str, Any],
    *,
    layers: Runs,
    first_device: int,
    memory: Memory,
    offload: Offload = NOTHING_OFFLOADED,
    shards_sequence: bool,
) -> StagePlan:
    """A stage at these knobs (`mist.plans.knobs`), at rest in the others, on devices in a row.

    `shards_sequence`: whether tensor parallelism does so where there is any.
    """
    numbers: dict[str, Any] = {**AT_REST, **knobs}
    values = {knob.name: knob.value_of(numbers[knob.name]) for knob in STAGE_KNOBS}
    return StagePlan(
        **values,
        layers=layers,
        devices=(first_device, values["dp"] * values["tp"] * values["cp"]),
        sp=shards_sequence and values["tp"] > 1,
        memory=dict(memory),
        offload=offload,
    )


def uniform_layout(  # noqa: PLR0913 - what makes a layout
    knobs: Mapping[str, Any],
    *,
    chunk_layers: Sequence[int],
    memory: Sequence[Memory],
    num_micro_batches: int,
    schedule: Schedule,
    offload: Offload = NOTHING_OFFLOADED,
    shards_sequence: bool,
) -> Layout:
    """A pipeline whose stages have the same knobs.

    Args:
        knobs: of each stage, by name; see `stage_at`.
        chunk_layers: layers of each chunk of each stage, in the order of the model.
        memory: layers of each stage at each memory level; its length is the number of stages.
        num_micro_batches: of a step.
        schedule: order of micro-batches.
        offload: what each stage has in host memory.
        shards_sequence: whether tensor parallelism does so.
    """
    runs = layer_runs(chunk_layers, len(memory))
    stages: list[StagePlan] = []
    for own, levels in zip(runs, memory, strict=True):
        stage = stage_at(
            knobs,
            layers=own,
            first_device=sum(stages[-1].devices) if stages else 0,
            memory=levels,
            offload=offload,
            shards_sequence=shards_sequence,
        )
        stages.append(stage)
    return Layout(stages=tuple(stages), num_micro_batches=num_micro_batches, schedule=schedule)


def chunk_shares(counts: Sequence[int], chunks: int) -> tuple[int, ...]:
    """Layers of each chunk of each stage, in the order of the model, from those of each stage.

    The first chunks take the layers that do not divide, as `schedules.layers_more` counts them.
    """
    return tuple(
        count // chunks + (chunk < count % chunks) for chunk in range(chunks) for count in counts
    )


def layer_runs(chunk_layers: Sequence[int], num_stages: int) -> list[Runs]:
    """Runs [first, count] of layers of each stage; stages take the chunks of the model in turn."""
    runs: list[list[tuple[int, int]]] = [[] for _ in range(num_stages)]
    first = 0
    for part, count in enumerate(chunk_layers):
        if count:
            runs[part % num_stages].append((first, count))
        first += count
    return [tuple(own) for own in runs]
