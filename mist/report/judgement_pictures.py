"""Pictures of what was judged anew: trade-offs, one step in time, and what is uncertain."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from mist.plans.breakdown import short_layout
from mist.plans.plan import Limits, Plan
from mist.report.pictures import HALF_ROW, Picture, Shape, row_rect
from mist.report.plan_pictures import limit_lines
from mist.report.plan_report import DrawnSteps, Judgement, StagePoint, WhatIf
from mist.report.plot import pareto_front
from mist.report.step_timeline import Pass, StagePace, Timeline, timeline
from mist.units import GIB, MILLISECOND, format_bytes, format_count, format_seconds

STREAMS: Final = {
    "compute": ("compute", "compute"),
    "recompute": ("compute", "recomputation"),
    "launch": ("compute", "waiting for kernel launches"),
    "tp": ("network", "tensor-parallel collectives"),
    "dp": ("network", "exposed data-parallel collectives"),
    "p2p": ("network", "transfers between stages"),
    "offload": ("host copies", "exposed copies to the host"),
}
"""Of each part of a step the stream that is busy with it, and its name."""
MOST_STAGES: Final = 6  # that a picture with several rows for each has room for
MOST_CARDS: Final = 1.5  # cards' memory, as far as layouts are shown
NUM_DENSITIES: Final = 24  # places at which the width of a violin is drawn


def judgement_pictures(plan: Plan, limits: Limits, known: Judgement) -> tuple[Picture, ...]:
    """All of them, in the order in which a report shows them."""
    step = timeline(plan.layout, known.paces)
    return (
        pareto(plan, limits, known),
        stage_trade_offs(plan, limits, known.stage_points),
        step_picture(plan, known.paces, step),
        memory_over_step(plan, limits, step),
        robustness(plan, known.draws),
        sensitivity(known.what_ifs),
    )


def pareto(plan: Plan, limits: Limits, known: Judgement) -> Picture:
    """Step time against peak memory of the layouts that were judged, and of the plan."""
    front = set(map(id, pareto_front(known.points)))
    shapes = []
    # Layouts that need several cards' memory would press all others to the left.
    most_bytes = MOST_CARDS * plan.estimate.stages[0].usable_bytes
    for point in (each for each in known.points if each.peak_bytes < most_bytes):
        series = "layout judged"
        if id(point) in front:
            series = "fastest at its memory"
        words = _point_words(point.layout, point.step_s, point.peak_bytes)
        shapes.append(_dot(series, point.peak_bytes / GIB, point.step_s, words))
    for other in plan.alternatives:
        words = _point_words(other.layout, other.step_s, other.peak_bytes)
        shapes.append(_dot("alternative", other.peak_bytes / GIB, other.step_s, words))
    peak_bytes = max(stage.peak_bytes for stage in plan.estimate.stages)
    words = _point_words("the plan", plan.estimate.step_s, peak_bytes)
    shapes.append(_mark("the plan", peak_bytes / GIB, plan.estimate.step_s, words))
    return Picture(
        name="pareto",
        title="Step time and memory of other layouts",
        caption="Each dot is a layout whose stages are alike, nothing offloaded; alternatives are "
        "those of the plan file. Right of the line a plan does not fit.",
        x_label="peak memory per GPU [GiB]",
        y_label="step [s]",
        zooms=True,
        shapes=(*shapes, *limit_lines(plan, limits)),
    )


def _dot(series: str, x: float, y: float, words: str) -> Shape:
    return Shape(kind="dot", series=series, x1=x, y1=y, words=words)


def _mark(series: str, x: float, y: float, words: str) -> Shape:
    return Shape(kind="mark", series=series, x1=x, y1=y, words=words)


def _point_words(layout: str, step_s: float, peak_bytes: float) -> str:
    return f"{layout}: {format_seconds(step_s)} per step, peak {format_bytes(peak_bytes)}"


def stage_trade_offs(plan: Plan, limits: Limits, stages: Sequence[Sequence[StagePoint]]) -> Picture:
    """Stable and lone time of other ways to run each stage; those that do not fit are left out."""
    shapes = []
    for index in _shown_stages(len(stages)):
        own, *others = stages[index]
        for point in others:
            if point.peak_bytes <= limits.device_bytes:
                shapes.append(_dot(f"stage {index}", *_stage_point(index, point)))
        shapes.append(_mark(f"stage {index}, the plan", *_stage_point(index, own)))
    return Picture(
        name="stages",
        title="Other ways to run each stage",
        caption="One micro-batch amid others, and one that is alone in its step: the two times by "
        "which the search compares ways to run a stage.",
        x_label="micro-batch amid others [ms]",
        y_label="micro-batch alone [ms]",
        zooms=True,
        shapes=tuple(shapes),
    )


def _stage_point(index: int, point: StagePoint) -> tuple[float, float, str]:
    words = (
        f"stage {index}, {point.words}: {format_seconds(point.stable_s)} amid others, "
        f"{format_seconds(point.lone_s)} alone, peak {format_bytes(point.peak_bytes)}"
    )
    return point.stable_s / MILLISECOND, point.lone_s / MILLISECOND, words


def _shown_stages(num_stages: int) -> list[int]:
    """The first and the last stage and some between, where all have no room."""
    return sorted({round(i) for i in np.linspace(0, num_stages - 1, min(num_stages, MOST_STAGES))})


def step_picture(plan: Plan, paces: Sequence[StagePace], step: Timeline) -> Picture:
    """The passes of one step on each stage and stream, to scale."""
    lanes = _lanes(paces)
    shown = _shown_stages(len(paces))
    rows = {(stage, lane): row for row, (stage, lane) in enumerate(_rows(shown, lanes))}
    shapes = [
        shape
        for each in step.passes
        if each.stage in shown
        for shape in _pass_shapes(each, paces[each.stage], plan.schedule.vpp, rows)
    ]
    for stage in shown:
        end_s, pace = step.ends_s[stage], paces[stage]
        words = f"stage {stage}: once per step, {format_seconds(pace.once_s)}"
        span = (end_s - pace.once_s, end_s)
        shapes.append(row_rect(rows[stage, "compute"], span, "once per step", words))
    return Picture(
        name="timeline",
        title="One step in time",
        caption=_step_caption(plan, step),
        x_label="seconds from the start of the step",
        row_names=tuple(
            f"stage {stage}" if lane == "compute" else f"{lane} of {stage}" for stage, lane in rows
        ),
        zooms=True,
        shapes=tuple(shapes),
    )


def _rows(shown: Sequence[int], lanes: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((stage, lane) for stage in shown for lane in lanes)


def _lanes(paces: Sequence[StagePace]) -> list[str]:
    """The streams that anything waits for."""
    spent = {
        STREAMS[part][0]
        for pace in paces
        for parts in (pace.forward_s, pace.backward_s)
        for part, s in parts.items()
        if s > 0
    }
    return [lane for lane in ("compute", "network", "host copies") if lane in spent | {"compute"}]


def _pass_shapes(
    each: Pass, pace: StagePace, chunks: int, rows: dict[tuple[int, str], int]
) -> Iterator[Shape]:
    """The parts of a pass one after the other, each in the row of its stream."""
    start_s = each.start_s
    name = f"stage {each.stage}, micro-batch {each.micro_batch}"
    name += f", chunk {each.chunk}" if chunks > 1 else ""
    for part, s in _parts(each, pace, chunks):
        lane, words = STREAMS[part]
        series = each.kind if part == "compute" else words
        text = f"{name}, {each.kind}: {words} {format_seconds(s)}"
        yield row_rect(rows[each.stage, lane], (start_s, start_s + s), series, text)
        start_s += s


def _parts(each: Pass, pace: StagePace, chunks: int) -> Iterator[tuple[str, float]]:
    if each.kind == "weights":
        yield "compute", each.end_s - each.start_s
        return
    parts = dict(pace.forward_s if each.kind == "forward" else pace.backward_s)
    # Where a schedule splits the backward pass, the gradients of weights are another pass.
    split_s = sum(parts.values()) - chunks * (each.end_s - each.start_s)
    parts["compute"] -= max(split_s, 0.0)
    for part, s in parts.items():
        if s > 0:
            yield part, s / chunks


def _step_caption(plan: Plan, step: Timeline) -> str:
    num = plan.num_micro_batches
    shown = step.num_micro_batches
    words = "What a stage computes, and what it waits for, pass by pass. "
    if shown < num:
        return f"{words}Drawn with {shown} of the {num} micro-batches; those between are alike."
    return (
        f"{words}Run in this order the step takes {format_seconds(step.step_s)}; the formula that "
        f"plans are compared by gives {format_seconds(plan.estimate.step_s)}."
    )


def memory_over_step(plan: Plan, limits: Limits, step: Timeline) -> Picture:
    """Bytes of a GPU of each stage as micro-batches come and go."""
    shapes = []
    for index in _shown_stages(len(plan.stages)):
        for at_s, held_bytes in _held(plan, step, index):
            words = f"stage {index} at {format_seconds(at_s)}: {format_bytes(held_bytes)}"
            shapes.append(
                Shape(
                    kind="line",
                    series=f"stage {index}",
                    x1=at_s,
                    y1=held_bytes / GIB,
                    words=words,
                )
            )
    return Picture(
        name="memory-in-time",
        title="Memory over one step",
        caption="Activations grow over each forward pass and go over each backward pass, in which "
        "working memory comes on top.",
        x_label="seconds from the start of the step",
        y_label="memory per GPU [GiB]",
        zooms=True,
        shapes=(*shapes, *limit_lines(plan, limits, "y")),
    )


def _held(plan: Plan, step: Timeline, index: int) -> Iterator[tuple[float, float]]:
    """Seconds and bytes at the ends of each pass of a stage.

    A backward pass has all of its micro-batch and the working memory as it begins.
    """
    parts = dict(plan.estimate.stages[index].memory_parts_bytes)
    activations, working = parts.pop("activations", 0), parts.pop("working", 0)
    rest = sum(parts.values())
    splits = any(each.kind == "weights" for each in step.passes)
    frees = "weights" if splits else "backward"
    own = [each for each in step.passes if each.stage == index]
    counts = np.cumsum([(each.kind == "forward") - (each.kind == frees) for each in own])
    share = activations / counts.max()
    before = 0
    for each, after in zip(own, counts.tolist(), strict=True):
        extra = 0 if each.kind == "forward" else working
        yield each.start_s, rest + share * before + extra
        yield each.end_s, rest + share * after + extra
        before = after


def robustness(plan: Plan, draws: Sequence[DrawnSteps]) -> Picture:
    """The steps of the plan and of other layouts over the draws of what is uncertain."""
    shapes: list[Shape] = []
    names = ["the plan", *(f"other {index}" for index in range(1, len(draws)))]
    for row, (name, drawn) in enumerate(zip(names, draws, strict=True)):
        shapes += _violin(row, name, drawn)
    return Picture(
        name="robustness",
        title="Steps where figures of the platform are wrong",
        caption=f"Each dot is one of {len(draws[0].steps_s)} draws of what is uncertain; the shape "
        "is wide where many lie. Others are the fastest that fit, of unlike kinds.",
        x_label="step [s]",
        row_names=tuple(names),
        shapes=tuple(shapes),
    )


def _violin(row: int, name: str, drawn: DrawnSteps) -> Iterator[Shape]:
    steps = np.array(drawn.steps_s)
    # Scott's rule; draws that are all alike have no width to speak of.
    width = max(float(steps.std()) * len(steps) ** -0.2, 1e-3 * float(steps.mean()))
    places = np.linspace(steps.min() - width, steps.max() + width, NUM_DENSITIES)
    density = np.exp(-0.5 * ((places[:, None] - steps) / width) ** 2).sum(axis=1)
    density *= HALF_ROW / density.max()
    for x, half in zip(places.tolist(), density.tolist(), strict=True):
        yield Shape(kind="area", series=name, x1=x, y1=row - half, y2=row + half)
    layout = name if name == "the plan" else f"{name}, {short_layout(drawn.layout)}"
    for s in drawn.steps_s:
        yield _dot("one draw", s, row, f"{layout}: {format_seconds(s)}")
    middle = float(np.median(steps))
    yield _mark("median", middle, row, f"{layout}: median {format_seconds(middle)}")


def sensitivity(what_ifs: Sequence[WhatIf]) -> Picture:
    """Tokens per second of the plan where one thing is another, and of the best layout then."""
    shapes = []
    for row, each in enumerate(what_ifs):
        fits = each.peak_bytes <= each.limit_bytes
        series = "the plan" if fits else "the plan, which does not fit"
        verdict = "fits" if fits else "does not fit"
        words = (
            f"{each.change}: the plan {format_count(each.tokens_per_s)} tokens/s, {verdict} "
            f"(peak {format_bytes(each.peak_bytes)} of {format_bytes(each.limit_bytes)})"
        )
        shapes.append(row_rect(row, (0.0, each.tokens_per_s), series, words))
        if each.best:
            best = f"{each.change}: {each.best}, {format_count(each.best_tokens_per_s)} tokens/s"
            shapes.append(_dot("best layout judged", each.best_tokens_per_s, row, best))
    return Picture(
        name="sensitivity",
        title="What if",
        caption="Bars: this plan where one thing is another. Dots: a faster layout then, where one "
        "was judged.",
        x_label="tokens per second",
        row_names=tuple(each.change for each in what_ifs),
        shapes=tuple(shapes),
    )
