"""`mist compare`: a plan beside the log of its run, or plans, configurations and logs in a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mist.calibrate.logs import read_log
from mist.calibrate.run_comparison import RunComparison, compared
from mist.errors import InputError
from mist.plans.file import load_plan
from mist.report.plan_report import sheet_of
from mist.report.plan_screen import Sheet
from mist.report.side_by_side import ComparedSubject, subject_of_log, subject_of_sheet
from mist.symbolic.load_programs import Progress, quiet
from mist.workflow.checking import HandLayout
from mist.workflow.foreign_files import check_file, foreign_file, names_said
from mist.workflow.request import Question


def compare(plan_path: Path, log_path: Path) -> RunComparison:
    """Set a plan beside the log of its run.

    Raises PlanError for a broken plan, InputError for a broken log or one of another layout.
    """
    plan, log = load_plan(plan_path), read_log(log_path)
    if log.stages and len(log.stages) != len(plan.stages):
        raise InputError(
            f"{log_path} has {len(log.stages)} stages, but {plan_path} has {len(plan.stages)}: "
            "it is the log of another plan. Give the log of this one (mist apply PLAN --log FILE)."
        )
    return compared(plan, log)


PLAN_ENDINGS: Final = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOpen:
    """What configurations do not say themselves; `typed`: the options that the user gave."""

    question: Question
    layout: HandLayout
    typed: Mapping[str, Any] = field(default_factory=dict)


def subjects_of(
    paths: Sequence[Path], open_: LeftOpen, progress: Progress = quiet
) -> tuple[ComparedSubject, ...]:
    """Each file as a column: a plan as it was predicted, a configuration judged, a log measured.

    Raises InputError for a file that is none of these, or leaves something open.
    """
    return tuple(_subject(path, open_, progress) for path in paths)


def _subject(path: Path, open_: LeftOpen, progress: Progress) -> ComparedSubject:
    name = str(path)
    file = foreign_file(name)
    if file is None and path.suffix in PLAN_ENDINGS:
        return subject_of_sheet(name, "plan", sheet_of(load_plan(path)))
    if file is None:
        return subject_of_log(name, read_log(path))
    # An option may be for another file of the row: what this one says itself stands.
    said = names_said(file.configuration)
    typed = {name: value for name, value in open_.typed.items() if name not in said}
    checked = check_file(file, open_.question, open_.layout, typed, progress)
    sheet = Sheet(plan=checked.plan, limits=checked.limits, host=checked.host, notes=checked.notes)
    return subject_of_sheet(name, "configuration", sheet)
