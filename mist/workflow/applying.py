"""`mist apply`: a plan and its model, checked against each other, then trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mist.exec import RunOptions, apply, shown_by_torchrun
from mist.plans.file import load_plan
from mist.trace import TraceSetting, load_graph
from mist.workflow.plan_model import UNDER_HERE, ModelAccess, model_of


def apply_plan(
    path: Path,
    options: RunOptions,
    progress: Callable[[str], None],
    access: ModelAccess = UNDER_HERE,
) -> None:
    """Train as the plan in a file says.

    Raises InputError for a model that may not run and for what cannot be run, before any rank
    starts, RankFailed and Stopped.
    """
    with shown_by_torchrun():
        plan = load_plan(path)
        source = model_of(plan, path, access, progress)
        workload = plan.workload
        setting = TraceSetting(
            precision=workload.precision,
            attention=workload.attention,
            seq_len=workload.seq_len,
            images=workload.images,
        )
        facts = load_graph(source, setting, progress=progress).facts
        apply(replace(options, model=source), plan, facts)
