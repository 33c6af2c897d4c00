"""`mist compare PLAN LOG`: what a plan predicted beside what its run measured."""

from pathlib import Path

from mist.calibrate.logs import read_log
from mist.calibrate.run_comparison import RunComparison, compared
from mist.errors import InputError
from mist.plans.file import load_plan


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
