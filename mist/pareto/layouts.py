"""A layout that a search found: what each stage does, in plain numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mist.pareto.frontier_points import Points
from mist.pareto.offload_ratios import whole_layers
from mist.pareto.strategies import Group, Ints, Strategies
from mist.plans.knobs import AT_REST
from mist.plans.memory_levels import level_counts
from mist.plans.plan import Layout, Offload, Schedule, StagePlan
from mist.plans.schedules import fill_time, spare_time, step_time
from mist.plans.uniform_stages import chunk_shares, layer_runs, stage_at
from mist.plans.workload import MemoryLevel
from mist.symbolic.job import Job
from mist.symbolic.pipeline_costs import resharding_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """What one stage does with layers [first, count]; the first `num_lower` are at `lower`.

    `knobs`: of a stage, by name (`mist.plans.knobs`).
    """

    first: int
    count: int
    num_devices: int
    knobs: Mapping[str, int]
    offload: Offload
    upper: MemoryLevel
    lower: MemoryLevel
    num_lower: int

    @property
    def memory(self) -> dict[MemoryLevel, int]:
        """Layers at each level."""
        parts = ((self.upper, self.count - self.num_lower), (self.lower, self.num_lower))
        return level_counts(*parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedLayout:
    """A pipeline, its predicted step time and the peak of its fullest device."""

    schedule: Schedule
    num_micro_batches: int
    stages: tuple[StageChoice, ...]
    step_s: float
    peak_bytes: float

    @property
    def kind(self) -> tuple[object, ...]:
        """What tells layouts apart: schedule, pp, and of stage 0 tp, ZeRO, what it offloads."""
        first = self.stages[0]
        offload = first.offload
        away = [ratio > 0 for ratio in (offload.weights, offload.optimizer, offload.activations)]
        # Of one stage all schedules are the same, so they are one kind of layout.
        schedule = (self.schedule.kind, self.schedule.vpp) if len(self.stages) > 1 else ()
        return (schedule, len(self.stages), first.knobs["tp"], first.knobs["zero"], *away)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """A stage's layer count and the point that it takes."""

    count: int
    strategies: Strategies
    points: Points
    point: int

    @property
    def num_devices(self) -> int:
        """Devices of the stage."""
        row = int(self.points.row[self.point])
        return int(self.strategies.num_devices[row])


def layout_of(job: Job, group: Group, picked: Sequence[Picked]) -> PricedLayout:
    """The layout of picked points, first stage first: each starts where the one before ends.

    Its step includes what transfers between unlike neighbours add.
    """
    stages, first = [], 0
    for pick in picked:
        strategy = _strategy(pick.strategies, int(pick.points.row[pick.point]))
        stages.append(_choice(strategy, pick.points, pick.point, first, pick.count))
        first += pick.count
    stable_s, lone_s, weight_s, peaks = (
        np.array([getattr(pick.points, name)[pick.point] for pick in picked])
        for name in ("stable_s", "lone_s", "weight_s", "peak_bytes")
    )
    between_s = _between(job, picked)
    stable_s, lone_s = stable_s + between_s, lone_s + between_s
    spare_s = spare_time(group.schedule.kind, weight_s)
    fill_s = fill_time(stable_s, spare_s, chunks=group.schedule.vpp)
    return PricedLayout(
        schedule=group.schedule,
        num_micro_batches=group.num_micro_batches,
        stages=tuple(stages),
        step_s=float(step_time(group.num_micro_batches, stable_s, lone_s, fill_s)),
        peak_bytes=float(peaks.max()),
    )


def alike_pipelines(
    group: Group, strategies: Strategies, rows: Ints, stages: Sequence[Points], counts: Ints
) -> Iterator[PricedLayout]:
    """N layouts, each with one strategy in all its stages: no transfers between unlike neighbours.

    `rows` [N]: of the strategies; `stages`: N points of each stage; `counts` [N, S]: its layers.
    """
    stable_s, lone_s, weight_s, peaks = (
        np.stack([getattr(points, name) for points in stages], axis=-1)
        for name in ("stable_s", "lone_s", "weight_s", "peak_bytes")
    )
    spare_s = spare_time(group.schedule.kind, weight_s)
    fill_s = fill_time(stable_s, spare_s, chunks=group.schedule.vpp)
    step_s = step_time(group.num_micro_batches, stable_s, lone_s, fill_s)
    firsts = np.cumsum(counts, axis=1) - counts
    for index, row in enumerate(rows.tolist()):
        strategy = _strategy(strategies, row)
        yield PricedLayout(
            schedule=group.schedule,
            num_micro_batches=group.num_micro_batches,
            stages=tuple(
                _choice(strategy, points, index, first, count)
                for points, first, count in zip(
                    stages, firsts[index].tolist(), counts[index].tolist(), strict=True
                )
            ),
            step_s=float(step_s[index]),
            peak_bytes=float(peaks[index].max()),
        )


def _between(job: Job, picked: Sequence[Picked]) -> NDArray[np.float64]:
    names = ("term_p2p_in_node_s", "term_p2p_cross_s")
    rows = [int(pick.points.row[pick.point]) for pick in picked]
    terms = {
        name: np.array([p.strategies.terms[name][row] for p, row in zip(picked, rows, strict=True)])
        for name in names
    }
    ends = np.cumsum([pick.num_devices for pick in picked])[:-1]
    return resharding_seconds(terms, ends % job.platform.gpus_per_node == 0)


def _strategy(strategies: Strategies, row: int) -> dict[str, Any]:
    """The fields of a stage that its strategy decides."""
    return {
        "num_devices": int(strategies.num_devices[row]),
        "knobs": {name: int(column[row]) for name, column in strategies.knobs.items()},
        "offload": Offload(**{name: float(x[row]) for name, x in strategies.offload.items()}),
    }


def _choice(
    strategy: Mapping[str, Any], points: Points, point: int, first: int, count: int
) -> StageChoice:
    return StageChoice(
        first=first,
        count=count,
        upper=points.upper[point],
        lower=points.lower[point],
        num_lower=int(points.num_lower[point]),
        **strategy,
    )


def plain_layout(job: Job, layout: PricedLayout) -> Layout:
    """The layout as plans write it."""
    return Layout(
        stages=stage_plans(job, layout),
        num_micro_batches=layout.num_micro_batches,
        schedule=layout.schedule,
    )


def stage_plans(job: Job, layout: PricedLayout) -> tuple[StagePlan, ...]:
    """The stages of a layout as a plan writes them, devices in pipeline order.

    Where whole layers are offloaded, their share is rounded up to layers: never less memory than
    was planned, at most a layer's copies slower.
    """
    plans: list[StagePlan] = []
    device = 0
    shares = chunk_shares([stage.count for stage in layout.stages], layout.schedule.vpp)
    runs = layer_runs(shares, len(layout.stages))
    offload = job.platform.runtime.offload
    for stage, own in zip(layout.stages, runs, strict=True):
        by_layer = offload is not None and offload.by_layer
        is_last = len(plans) == len(layout.stages) - 1
        plans.append(
            stage_at(
                # Of a stage without a head every way to run it costs the same.
                stage.knobs if is_last else {**stage.knobs, "head": AT_REST["head"]},
                layers=own,
                first_device=device,
                shards_sequence=job.platform.runtime.knobs.sequence_parallel,
                memory=stage.memory,
                offload=_whole_layers(stage) if by_layer else stage.offload,
            )
        )
        device += stage.num_devices
    return tuple(plans)


def _whole_layers(stage: StageChoice) -> Offload:
    share = abs(float(whole_layers(stage.offload.weights, stage.count))) / stage.count
    return Offload(
        weights=share,
        grads=share,
        optimizer=stage.offload.optimizer,
        activations=stage.offload.activations,
    )
