"""Every run predicted, or why not: group by group, in a few processes."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from mist.errors import MistError
from mist.plans.memory_chance import fit_probability
from mist.plans.workload import Optimizer
from mist.platform.quantity import Quantity
from mist.platform.step_interval import step_interval
from mist.progress import is_due
from mist.symbolic.load_programs import Progress, model_programs, quiet
from mist.symbolic.program import ModelPrograms
from mist.validate.blank_columns import filled_runs, joined
from mist.validate.cases import Member, RunGroup, grouped, machine_of
from mist.validate.measured_runs import Run, Stages
from mist.validate.predict import Prediction, case_inputs, predict, predict_steps
from mist.validate.results import RunPrediction
from mist.validate.run_models import Impossible, Unsupported
from mist.validate.sources import Sources

GIB = 2.0**30
NUM_PROCESSES = 2
Programs = tuple[ModelPrograms, ...]


def predictions(
    runs: Sequence[Run],
    sources: Sources,
    *,
    stages: Stages,
    calibrated: bool,
    progress: Progress,
) -> tuple[RunPrediction, ...]:
    """One prediction for each run, in their order; of one with blank columns from all its cases."""
    cases = [filled_runs(run, sources, has_stages=run.run_id in stages) for run in runs]
    filled = [case.run for each in cases for case in each]
    groups, reasons = grouped(filled, sources, calibrated=calibrated, stages=stages)
    found = {
        run.run_id: _without_figures(run, reasons[run.run_id])
        for run in filled
        if run.run_id in reasons
    }
    for rows in _side_by_side(groups, sources, progress):
        found |= {row.run.run_id: row for row in rows}
    return tuple(
        joined(run, [(case, found[case.run.run_id]) for case in each])
        for run, each in zip(runs, cases, strict=True)
    )


def _side_by_side(
    groups: Sequence[RunGroup], sources: Sources, progress: Progress
) -> Iterable[list[RunPrediction]]:
    """The rows of every group, in a few processes."""
    context = get_context("spawn")
    workers = min(NUM_PROCESSES, max(1, len(groups)))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(partial(_rows, sources=sources), groups)
        for number, (group, rows) in enumerate(zip(groups, results, strict=True), start=1):
            if is_due(number, len(groups)):
                progress(f"{number} of {len(groups)} models: {group.key.config.name}")
            yield rows


def _rows(group: RunGroup, sources: Sources) -> list[RunPrediction]:
    """In a process of its own: a row for each run of a group."""
    programs = _compiled(group)
    if isinstance(programs, str):
        return [_failed(member, programs) for member in group.members]
    return _predicted(group, programs, sources)


def _compiled(group: RunGroup) -> Programs | str:
    """The costs, and those with an unknown setting the other way; or why there are none."""
    key, runtime = group.key, group.machine.runtime
    variants = {group.profile_hash: runtime}
    if runtime.kernels.gathers_input_again is None:
        kernels = replace(runtime.kernels, gathers_input_again=True)
        variants[f"{group.profile_hash}\ngathered again"] = replace(runtime, kernels=kernels)
    try:
        return tuple(
            model_programs(
                key.config, key.setting, each, profile_hash, quiet, optimizer=Optimizer.ADAMW
            )
            for profile_hash, each in variants.items()
        )
    except MistError as error:
        return str(error)
    except Exception as error:  # one run's fault is no reason to lose the others
        return f"{type(error).__name__}: {error}"


def _without_figures(run: Run, reason: Unsupported) -> RunPrediction:
    """Why a run has no times and bytes; one that cannot have run is predicted to fail."""
    if isinstance(reason, Impossible):
        return RunPrediction(
            run=run, status="refused", reason=str(reason), fits=False, fit_probability=0.0
        )
    return RunPrediction(run=run, status="unsupported", reason=str(reason))


def _failed(member: Member, reason: str) -> RunPrediction:
    return RunPrediction(run=member.run, status="error", reason=reason)


def _predicted(group: RunGroup, programs: Programs, sources: Sources) -> list[RunPrediction]:
    cases = [member.case for member in group.members]
    variants = [predict(each, group.machine, cases) for each in programs]

    inputs = case_inputs(programs[0], group.machine.cluster, cases)

    def log_steps(moved: Mapping[str, Quantity]) -> NDArray[np.float64]:
        machine = machine_of(group.key, sources, {**group.figures, **moved})
        return np.log(predict_steps(programs[0], machine, inputs))

    ends = np.transpose(step_interval(group.step_error, group.figures, log_steps)).tolist()
    return [
        _row(group, member, made, tuple(own))
        for member, made, own in zip(group.members, zip(*variants, strict=True), ends, strict=True)
    ]


def _row(
    group: RunGroup, member: Member, variants: Sequence[Prediction], ends: tuple[float, float]
) -> RunPrediction:
    """A run's row: the first variant is the estimate, the others widen its interval of memory.

    `ends`: of the measured over the predicted step.
    """
    made = variants[0]
    machine, kind = group.machine, group.key.origin.memory
    usable = machine.device.usable_bytes
    peaks = [
        (each.reserved_bytes if kind == "reserved" else each.allocated_bytes) / GIB
        for each in variants
    ]
    low, high = ends
    spread = machine.runtime.uncertainty.memory_ratio.value
    return RunPrediction(
        run=member.run,
        status="predicted",
        platform=f"{machine.device.name} on {machine.cluster.name}",
        runtime=machine.runtime.name,
        memory_kind=kind,
        step_s=made.step_s,
        step_low_s=low * made.step_s,
        step_high_s=high * made.step_s,
        peak_gib=peaks[0],
        peak_low_gib=min(peaks) * (1 - spread),
        peak_high_gib=max(peaks) * (1 + spread),
        stage_gib=tuple(size / GIB for size in made.stage_bytes),
        usable_gib=usable / GIB,
        fits=made.reserved_bytes <= usable,
        fit_probability=fit_probability(made.reserved_bytes, usable, spread),
        calibrated=group.calibrated,
    )
