"""Plans, configurations and logs of runs in a row, for people (a table) and for tools."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from mist.calibrate.logs import LoggedRun
from mist.plans.breakdown import PART_NAMES, layout_words, step_parts
from mist.plans.knobs import STAGE_KNOBS
from mist.plans.plan import Plan
from mist.report.plan_screen import Sheet
from mist.report.plan_words import offloaded, recomputed
from mist.report.tables import say
from mist.report.text_layout import columns, screen_width, wrapped
from mist.units import format_bytes, format_count, format_seconds

NOT_SAID: Final = "-"
ONE_LINE: Final = "in one line"  # for tools: people see each knob
SubjectKind = Literal["plan", "configuration", "log"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSubject:
    """One column. None, or nothing: the file does not say it.

    `fits`: within the margin of the plan; of a log it is known that it ran. `settings`: words by
    name. `parts_s`: the predicted step by part.
    """

    name: str
    kind: SubjectKind
    step_s: float
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_bytes: float | None = None
    fits: bool | None = None
    settings: dict[str, str] = field(default_factory=dict)
    parts_s: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def subject_of_sheet(name: str, kind: SubjectKind, sheet: Sheet) -> ComparedSubject:
    """A column of what is predicted."""
    plan, estimate = sheet.plan, sheet.plan.estimate
    peak_bytes = max(stage.peak_bytes for stage in estimate.stages)
    return ComparedSubject(
        name=name,
        kind=kind,
        step_s=estimate.step_s,
        tokens_per_s=estimate.tokens_per_s,
        mfu=estimate.mfu,
        peak_bytes=peak_bytes,
        fits=peak_bytes <= sheet.limits.device_bytes and sheet.host.fits,
        settings=_settings(plan),
        parts_s=step_parts(estimate, plan.num_micro_batches),
        notes=tuple(sheet.notes),
    )


def subject_of_log(name: str, log: LoggedRun) -> ComparedSubject:
    """A column of what was measured."""
    peaks = [stage.peak_bytes for stage in log.stages]
    return ComparedSubject(
        name=name, kind="log", step_s=log.step_s, peak_bytes=max(peaks, default=None), fits=True
    )


def _settings(plan: Plan) -> dict[str, str]:
    """What is trained on what, and each knob; where stages differ, of each stage."""
    knobs = {
        knob.word: _each([str(getattr(stage, knob.name)) for stage in plan.stages])
        for knob in STAGE_KNOBS
    }
    return {
        "model": plan.model.name,
        "GPUs": f"{plan.cluster.num_gpus} x {plan.cluster.device}",
        "runtime": plan.runtime,
        "sequence": str(plan.workload.seq_len),
        "global batch": str(plan.workload.global_batch),
        "stages": str(len(plan.stages)),
        "layers": _each([str(stage.num_layers) for stage in plan.stages]),
        **knobs,
        "micro-batches": str(plan.num_micro_batches),
        "recomputed": _each([recomputed(stage) for stage in plan.stages]),
        "on the host": _each([offloaded(stage) for stage in plan.stages]),
        ONE_LINE: layout_words(plan.layout),
    }


def _each(words: Sequence[str]) -> str:
    return words[0] if len(set(words)) == 1 else "; ".join(words)


def print_side_by_side(subjects: Sequence[ComparedSubject]) -> None:
    """Figures with the difference to the first column, settings that differ, parts of the step."""
    header = ("", *(f"{each.name} ({each.kind})" for each in subjects))
    _print_table("Figures (predicted; of logs measured)", [header, *_figures(subjects)])
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for each in subjects for name in each.settings):
        values = [each.settings.get(name, NOT_SAID) for each in subjects]
        if len(set(values) - {NOT_SAID}) > 1 and name != ONE_LINE:
            rows.append((name, *values))
    _print_table("Settings that differ", [header, *rows])
    parts: list[tuple[str, ...]] = []
    for part, words in PART_NAMES.items():
        seconds = [each.parts_s.get(part) for each in subjects]
        if any(seconds):
            cells = (NOT_SAID if s is None else format_seconds(s) for s in seconds)
            parts.append((words, *cells))
    _print_table("The predicted step by part", [header, *parts])
    for each in subjects:
        for note in each.notes:
            for line in wrapped(f"Note: {each.name}: {note.removesuffix('.')}.", screen_width(), 2):
                say(line)


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    for line in (f"{title}:", *columns(rows, screen_width()), ""):
        say(line)


def _figures(subjects: Sequence[ComparedSubject]) -> list[tuple[str, ...]]:
    first = subjects[0]
    steps = [
        f"{format_seconds(each.step_s)} ({each.step_s / first.step_s - 1:+.1%})"
        for each in subjects
    ]
    fits = {None: NOT_SAID, True: "yes", False: "no"}
    return [
        ("step", *steps),
        ("tokens/s", *(_said(each.tokens_per_s, format_count) for each in subjects)),
        ("MFU", *(_said(each.mfu, "{:.1%}".format) for each in subjects)),
        ("peak per GPU", *(_said(each.peak_bytes, format_bytes) for each in subjects)),
        ("fits", *(fits[each.fits] for each in subjects)),
    ]


def _said(value: float | None, words: Callable[[float], str]) -> str:
    return NOT_SAID if value is None else words(value)


def side_by_side_json(subjects: Sequence[ComparedSubject]) -> dict[str, object]:
    """`subjects`: the columns in their order; null where a file does not say a figure."""
    return {"subjects": [asdict(each) for each in subjects]}
