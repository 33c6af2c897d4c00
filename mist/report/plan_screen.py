"""A plan or a judged layout on one screen: the verdict first, then what it rests on.

At most MOST_LINES lines at 100 columns, for plans of any size: stages that are alike share a line,
and what has no room is counted. `mist.report.plan_tables` prints everything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from mist.plans.breakdown import (
    ROUNDING_RATIO,
    SHORT_NAMES,
    exceeded_words,
    short_layout,
    short_reasons,
    step_parts,
)
from mist.plans.host_memory import HostNeed
from mist.plans.plan import Alternative, Estimate, Limits, Plan, StageEstimate, StagePlan
from mist.plans.provenance import Kind
from mist.report.intervals import highest_peak_bytes, peak_words, step_words
from mist.report.plan_tables import print_details
from mist.report.plan_words import data_parallel, head_lines, offloaded, recomputed
from mist.report.tables import say
from mist.report.text_layout import bar, columns, screen_width, with_marks, wrapped
from mist.units import format_bytes, format_count, format_seconds

MOST_LINES: Final = 40
MOST_RUNS: Final = 6  # of stages that have a line each
MOST_ALTERNATIVES: Final = 5
MOST_TURNS: Final = 2  # what would change the choice
MEMORY_LETTERS: Final = {"states": "S", "activations": "A", "working": "W"}  # the rest is "O"
MORE: Final = "More: --details (all parts, op costs with their sources, what is not modelled)."
WITH_SECONDS: Final = 90  # columns, from which a step stands in seconds too
NARROW_COLUMNS: Final = 12  # of a bar, at the least


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What is shown: a plan, what it may use, and what was said on the way.

    `notes`: remarks about the input; `suggestions`: changes that help; `files`: what was written;
    `cost`: a sentence on dollars, "" where no price is known.
    """

    plan: Plan
    limits: Limits
    host: HostNeed
    notes: Sequence[str] = ()
    suggestions: Sequence[str] = ()
    files: Sequence[str] = ()
    cost: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Neighbouring stages that differ in their place only; `judged`: their predictions."""

    first: int
    stages: tuple[StagePlan, ...]
    judged: tuple[StageEstimate, ...]

    @property
    def name(self) -> str:
        return _span(self.first, len(self.stages))

    @property
    def fullest(self) -> StageEstimate:
        return max(self.judged, key=lambda stage: stage.peak_bytes)


def print_sheet(sheet: Sheet, *, details: bool) -> None:
    """One screen; behind it, with `details`, everything that is known."""
    for line in screen_lines(sheet):
        say(line)
    if details:
        print_details(sheet.plan, sheet.host, sheet.notes)


def screen_lines(sheet: Sheet) -> list[str]:
    """The screen, line by line, in the width of the terminal."""
    width, runs = screen_width(), _runs(sheet.plan)
    # Stages give way first, then the layouts that lose most: long ones take three lines each.
    sizes = [
        *((num_runs, MOST_ALTERNATIVES) for num_runs in range(min(MOST_RUNS, len(runs)), 1, -1)),
        *((1, num_others) for num_others in range(MOST_ALTERNATIVES, 0, -1)),
    ]
    for num_runs, num_others in sizes:
        lines = _lines(sheet, runs[:num_runs], num_others, width)
        if len(lines) <= MOST_LINES:
            break
    return lines


def _lines(sheet: Sheet, runs: Sequence[_Run], num_others: int, width: int) -> list[str]:
    """The screen with a line for each of these runs of stages, and at most so many layouts."""
    plan = sheet.plan
    body = [
        *_verdict(sheet, width),
        *_stages(plan, runs, width),
        *_memory(plan.estimate, runs, sheet.limits, width),
        *wrapped(_host_words(sheet.host), width, 2),
        *_where_the_step_goes(plan, width),
        *_alternatives(plan, sheet.limits, num_others, width),
        *_changes(plan, width),
        *(line for words in sheet.suggestions for line in wrapped(f"Try {words}", width, 4)),
    ]
    foot = [MORE, *([f"Wrote {' and '.join(sheet.files)}."] if sheet.files else [])]
    ends = [line for words in foot for line in wrapped(words, width, 2)]
    notes = [*sheet.notes, *plan.estimate.extrapolated]
    return [*body, *_notes(notes, width, MOST_LINES - len(body) - len(ends)), *ends]


def _verdict(sheet: Sheet, width: int) -> list[str]:
    """Whether it fits and what binds; then speed and cost; then of what."""
    lines = [*verdict_lines(sheet), *head_lines(sheet.plan)]
    return [line for words in lines for line in wrapped(words, width, 2)]


def verdict_lines(sheet: Sheet) -> list[str]:
    """Whether it fits and what binds, then speed and cost: sentences without line breaks."""
    estimate = sheet.plan.estimate
    speed = (
        f"Predicted: {step_words(estimate)}, {format_count(estimate.tokens_per_s)} tokens/s, "
        f"MFU {estimate.mfu:.1%}."
    )
    return [*_verdict_words(sheet), " ".join([speed, sheet.cost]).strip()]


def _verdict_words(sheet: Sheet) -> list[str]:
    """Whether the layout fits, with how much room, and whether the card or its margin binds."""
    estimate, limit_bytes = sheet.plan.estimate, sheet.limits.device_bytes
    fullest = max(estimate.stages, key=lambda stage: stage.peak_bytes)
    room, sure = limit_bytes - fullest.peak_bytes, peak_words(estimate)
    lines = [] if sheet.host.fits else [f"DOES NOT FIT in host memory: {sheet.host.over_words}."]
    if room >= 0:
        fits = "FITS, with" if sheet.host.fits else "Fits on the GPU, with"
        return [*lines, f"{fits} {format_bytes(room)} to spare ({sure}). {_at_worst(sheet)}"]
    lines.append(f"DOES NOT FIT: over by {format_bytes(-room)} per GPU ({sure}).")
    peak = f"The peak is {format_bytes(fullest.peak_bytes)}"
    lines.append(f"{peak}; {exceeded_words(fullest.peak_bytes, fullest.usable_bytes)}.")
    if fullest.peak_bytes <= fullest.usable_bytes:
        lines.append("Runs that close to what the device reports crawl or fail.")
    return lines


def _at_worst(sheet: Sheet) -> str:
    """What the upper end of the interval would exceed."""
    high_bytes = highest_peak_bytes(sheet.plan.estimate)
    usable_bytes = sheet.plan.estimate.stages[0].usable_bytes
    words = f"The upper end, {format_bytes(high_bytes)},"
    if high_bytes <= sheet.limits.device_bytes:
        return f"{words} fits too."
    if high_bytes <= usable_bytes:
        return f"{words} uses part of the margin and stays within the card."
    return f"{words} exceeds the card."


def _runs(plan: Plan) -> list[_Run]:
    """Stages in runs of those that are alike."""
    pairs = enumerate(zip(plan.stages, plan.estimate.stages, strict=True))
    runs = []
    for _, group in groupby(pairs, key=lambda item: _likeness(item[1][0])):
        members = list(group)
        stages, judged = zip(*(pair for _, pair in members), strict=True)
        runs.append(_Run(first=members[0][0], stages=stages, judged=judged))
    return runs


def _likeness(stage: StagePlan) -> StagePlan:
    """A stage without its place, so that like ones are equal."""
    layers = tuple((0, count) for _, count in stage.layers)
    return replace(stage, layers=layers, devices=(0, stage.devices[1]))


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _stages(plan: Plan, runs: Sequence[_Run], width: int) -> list[str]:
    header = ("Stage", "Layers", "GPUs", "dp", "tp", "zero", "mb", "Recomputed", "On the host")
    rows = [header, *map(_stage_row, runs)]
    # In words where there is room, else in short ones.
    lines = columns(rows, width)
    if len(lines) > len(rows):
        lines = columns([(*row[:-1], _shortened(row[-1])) for row in rows], width)
    left = len(plan.stages) - sum(len(run.stages) for run in runs)
    return [*lines, *([f"and {left} more stages: --details"] if left else [])]


def _stage_row(run: _Run) -> tuple[str, ...]:
    first, last = run.stages[0], run.stages[-1]
    layers = ",".join(_span(*one) for one in first.layers)
    if len(run.stages) > 1:
        layers = f"{first.num_layers} each"
    return (
        run.name,
        layers,
        _span(first.devices[0], sum(last.devices) - first.devices[0]),
        data_parallel(first),
        f"{first.tp}{'+sp' if first.sp else ''}",
        str(first.zero),
        str(first.micro_batch),
        recomputed(first),
        offloaded(first),
    )


def _shortened(words: str) -> str:
    return words.replace("optimizer", "optim").replace("activations", "acts")


def _memory(estimate: Estimate, runs: Sequence[_Run], limits: Limits, width: int) -> list[str]:
    """A bar for each run, its fullest stage against the card."""
    usable_bytes, limit_bytes = estimate.stages[0].usable_bytes, limits.device_bytes
    scale_bytes = max(usable_bytes, *(run.fullest.peak_bytes for run in runs))
    title = (
        f"Memory per GPU: a plan may use {format_bytes(limit_bytes)} (|), the usable "
        f"{format_bytes(usable_bytes)} (]) less a margin of {1 - limit_bytes / usable_bytes:.0%}; "
        "S states, A activations, W working, O other"
    )
    rows = []
    for run in runs:
        parts = _memory_parts(run.fullest)
        line = _memory_bar(
            parts, (limit_bytes, usable_bytes), scale_bytes, max(NARROW_COLUMNS, width - 67)
        )
        sizes = ", ".join(f"{letter} {format_bytes(size)}" for letter, size in parts.items())
        rows.append((run.name, line, format_bytes(run.fullest.peak_bytes), sizes))
    return [*wrapped(title, width, 2), *columns(rows, width)]


def _memory_parts(stage: StageEstimate) -> dict[str, float]:
    """Bytes of the peak by letter."""
    parts = dict.fromkeys([*MEMORY_LETTERS.values(), "O"], 0.0)
    for name, size in stage.memory_parts_bytes.items():
        parts[MEMORY_LETTERS.get(name, "O")] += size
    return parts


def _memory_bar(
    parts: dict[str, float], marks_bytes: tuple[float, float], scale_bytes: float, length: int
) -> str:
    """A line like [SSSSAAAA...|..]: what is used, the limit of a plan, and the end of the card."""
    free = {".": scale_bytes - sum(parts.values())}
    places = [round(length * size / scale_bytes) for size in marks_bytes]
    marks = {places[1]: "]", places[0]: "|"} if places[0] != places[1] else {places[1]: "]"}
    return f"[{with_marks(bar(parts | free, length), marks)}"


def _host_words(host: HostNeed) -> str:
    """What is offloaded, of what there is; "" where nothing is."""
    if not host.held_bytes:
        return ""
    advice = "; give yours with --host-memory" if host.kind is Kind.GUESS else ""
    return (
        f"Host memory: {format_bytes(host.needed_bytes)} per node of "
        f"{format_bytes(host.memory_bytes)} ({host.kind}{advice})."
    )


def _where_the_step_goes(plan: Plan, width: int) -> list[str]:
    """One bar over the width, and a legend of seconds and per cent."""
    step_s = plan.estimate.step_s
    parts = step_parts(plan.estimate, plan.num_micro_batches)
    spent = {SHORT_NAMES[p]: s for p, s in parts.items() if s > ROUNDING_RATIO * step_s}
    line = bar({name[0].upper(): s for name, s in spent.items()}, width - 2)
    legend = [
        f"{name[0].upper()} {name} {format_seconds(s)} ({s / step_s:.1%})"
        for name, s in spent.items()
    ]
    return ["Where the step goes:", f"[{line}]", *_listed(legend, width)]


def _listed(items: Iterable[str], width: int) -> list[str]:
    """Items with commas between them; no line breaks inside of one."""
    lines = [""]
    for item in items:
        joined = f"{lines[-1]}, {item}" if lines[-1] else item
        if len(joined) >= width:
            lines[-1] += ","
            lines.append(item)
        else:
            lines[-1] = joined
    return lines


def _alternatives(plan: Plan, limits: Limits, most: int, width: int) -> list[str]:
    """So many other layouts, a line each; the nearest of those too large is among them."""
    large = plan.excluded[:1]
    others = plan.alternatives[: most - len(large)]
    if not (others or large):
        return []
    rows = [_alternative_row(each, plan, width, short_reasons(each.reason)) for each in others]
    for each in large:
        over_bytes = each.peak_bytes - limits.device_bytes
        too_large = [f"{format_bytes(over_bytes)} too large per GPU"]
        reasons = too_large if over_bytes > 0 else short_reasons(each.reason)
        rows.append(_alternative_row(each, plan, width, reasons))
    return columns(_in_one_line([("Other layouts", "step", ["why not"]), *rows], width), width)


def _alternative_row(
    other: Alternative, plan: Plan, width: int, reasons: Sequence[str]
) -> tuple[str, str, Sequence[str]]:
    """Layout, step, and versions of the reason; how much slower it is alone on a narrow screen."""
    change = f"{other.step_s / plan.estimate.step_s - 1:+.1%}"
    step = change if width < WITH_SECONDS else f"{format_seconds(other.step_s)} {change}"
    return (short_layout(other.layout), step, reasons)


def _in_one_line(
    rows: Sequence[tuple[str, str, Sequence[str]]], width: int
) -> list[tuple[str, ...]]:
    """The longest reason of each row that ends on its line, the shortest where none does."""
    room = width - sum(max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    return [
        (layout, step, next((words for words in reasons if len(words) <= room), reasons[-1]))
        for layout, step, reasons in rows
    ]


def _changes(plan: Plan, width: int) -> list[str]:
    """How the plan does where figures are wrong, and what would make another one better."""
    robust = plan.robustness
    if robust is None:
        needs = [each for each in plan.alternatives if each.needs.startswith("ties if ")][:1]
        words = [f"{short_layout(each.layout)} {each.needs}." for each in needs]
        return [line for each in words for line in wrapped(each, width, 2)]
    sentences = [
        f"Over {robust.num_draws} draws of what is uncertain a step takes "
        f"{format_seconds(robust.median_step_s)} (median) to {format_seconds(robust.worst_step_s)} "
        f"(worst), at most {robust.regret.worst_ratio:.1%} more than the best layout of a draw."
    ]
    known = [robust.nominal_layout, *(each.layout for each in plan.alternatives)]
    for turn in robust.turns[:MOST_TURNS]:
        sentence = turn
        for layout in known:
            sentence = sentence.replace(layout, short_layout(layout))
        sentences.append(f"{sentence[0].upper()}{sentence[1:]}.")
    return [line for words in sentences for line in wrapped(words, width, 2)]


def _notes(notes: Sequence[str], width: int, room: int) -> list[str]:
    """As many notes as have room, and how many more there are."""
    lines: list[str] = []
    for index, note in enumerate(notes):
        more = wrapped(f"Note: {note.removesuffix('.')}.", width, 2)
        is_last = index == len(notes) - 1
        if len(lines) + len(more) + (0 if is_last else 1) > room:
            return [*lines, f"{len(notes) - index} more notes: --details"]
        lines += more
    return lines
