"""Every run predicted, or why not: traces in a few processes, predictions group by group."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from mist.errors import MistError
from mist.programs import model_programs
from mist.symbolic.program import ModelPrograms
from mist.validate.cases import Group, Member, grouped
from mist.validate.predict import Prediction, predict
from mist.validate.results import RunPrediction
from mist.validate.runs import Run
from mist.validate.sources import Source, Sources

GIB = 2.0**30
NUM_PROCESSES = 2
Progress = Callable[[str], None]


def predictions(
    runs: Sequence[Run], sources: Sources, *, calibrated: bool, progress: Progress
) -> tuple[RunPrediction, ...]:
    """One prediction for each run, in their order."""
    groups, reasons = grouped(runs, sources, calibrated=calibrated)
    found = {
        run.run_id: RunPrediction(run=run, status="unsupported", reason=reasons[run.run_id])
        for run in runs
        if run.run_id in reasons
    }
    for group, programs in _programs(groups, progress):
        if isinstance(programs, str):
            rows = [_failed(member, programs) for member in group.members]
        else:
            rows = _predicted(group, programs, sources)
        found |= {row.run.run_id: row for row in rows}
    return tuple(found[run.run_id] for run in runs)


def _programs(
    groups: Sequence[Group], progress: Progress
) -> Iterable[tuple[Group, ModelPrograms | str]]:
    """The compiled costs of every group, or why there are none; traced side by side."""
    context = get_context("spawn")
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        results = pool.map(_compiled, groups)
        for number, (group, result) in enumerate(zip(groups, results, strict=True), start=1):
            progress(f"{number} of {len(groups)} models: {group.key.config.name}")
            yield group, result


def _compiled(group: Group) -> ModelPrograms | str:
    """In a process of its own."""
    key = group.key
    try:
        return model_programs(
            key.config,
            key.setting,
            group.machine.runtime,
            group.profile_hash,
            lambda message: None,
        )
    except MistError as error:
        return str(error)


def _failed(member: Member, reason: str) -> RunPrediction:
    return RunPrediction(run=member.run, status="error", reason=reason)


def _predicted(group: Group, programs: ModelPrograms, sources: Sources) -> list[RunPrediction]:
    made = predict(programs, group.machine, [member.case for member in group.members])
    source = sources.sources.get(group.key.source)
    return [
        _row(group, member, each, source) for member, each in zip(group.members, made, strict=True)
    ]


def _row(group: Group, member: Member, made: Prediction, source: Source | None) -> RunPrediction:
    machine, kind = group.machine, source.memory if source else "reserved"
    usable = machine.device.memory_bytes.value - machine.device.context_bytes.value
    peak = (made.reserved_bytes if kind == "reserved" else made.allocated_bytes) / GIB
    spread = machine.runtime.uncertainty.memory_ratio.value
    return RunPrediction(
        run=member.run,
        status="predicted",
        platform=f"{machine.device.name} on {machine.cluster.name}",
        runtime=machine.runtime.name,
        memory_kind=kind,
        step_s=made.step_s,
        peak_gib=peak,
        peak_low_gib=peak * (1 - spread),
        peak_high_gib=peak * (1 + spread),
        stage_gib=tuple(size / GIB for size in made.stage_bytes),
        fits=made.reserved_bytes <= usable,
        calibrated=group.calibrated,
    )
