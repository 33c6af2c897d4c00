"""Step times of runs of torch itself as functions of the constants that are fitted to them.

Every run is predicted on a grid of the constants; between its points the logarithm of the time is
interpolated. One pass over the runs, so that a fit without some of them costs milliseconds and
every run can be left out in turn.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mist.platform.calibration import calibrated, with_values
from mist.platform.profiles import load_device
from mist.symbolic.compile import compile_model
from mist.symbolic.load_programs import quiet
from mist.symbolic.program import ModelPrograms
from mist.trace import load_graph
from mist.validate.cases import RunGroup, grouped
from mist.validate.measured_runs import Run, read_runs
from mist.validate.predict import RunProfiles, predict
from mist.validate.predictions import GIB
from mist.validate.scores import TIERS, runs_regularly
from mist.validate.sources import Sources, load_sources

Floats = NDArray[np.float64]
SPEED = "device.tensor_time_scale"
TRAFFIC = "runtime.kernels.memory_time_scale"
NETWORK = "cluster.network.efficiency_ratio"
TENSOR = "runtime.overlap.tensor_parallel_time_scale"
GRID = {
    SPEED: (0.9, 1.05, 1.2, 1.4, 1.65, 2.0),
    TRAFFIC: (0.5, 0.8, 1.2, 1.8, 2.6),
    NETWORK: (0.1, 0.16, 0.25, 0.35, 0.5, 0.7, 1.0),
    TENSOR: (1.0, 1.7, 2.6, 4.0),
}
# What runtime torch runs, whichever runtime `mist validate` takes their sources for.
NATIVE = ("torchtitan-log", "torchtitan", "torchao", "thunder", "yafsdp-fsdp1", "fms-fsdp-eager",
          "fms-fsdp")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRun:
    """A run, its device, and the logarithm of its predicted step over the grid of constants."""

    run: Run
    device: str
    log_s: Floats

    def log_error(self, values: Mapping[str, float]) -> float:
        """log(predicted / measured) at constants inside the grid."""
        log_s = self.log_s
        for name, grid in GRID.items():  # one axis after another, the first of those left
            at = np.interp(np.log(values[name]), np.log(grid), np.arange(len(grid)))
            below = min(int(at), len(grid) - 2)
            log_s = log_s[below] + (at - below) * (log_s[below + 1] - log_s[below])
        return float(log_s - np.log(self.run.step_time_s))


def torch_sources() -> Sources:
    """The table of sources with all native ones read as runtime torch."""
    table = load_sources()
    titan = ("torchtitan", "torchao")
    own = {name: replace(table.sources[name], runtime="torch") for name in NATIVE}
    own |= {name: replace(own[name], selective_as="torchtitan") for name in titan}
    return replace(table, sources={**table.sources, **own})


def is_used(run: Run) -> bool:
    """Whether a run says something: dense bf16 with a time; copies of shards are left out."""
    ran = run.outcome == "ok" and run.step_time_s is not None and run.tier in TIERS
    return run.source in NATIVE and ran and run.precision == "bf16" and run.zero_or_fsdp != "hsdp"


def timed_runs(path: Path) -> list[TimedRun]:
    """Every native run of a file; those that fight for memory are left out."""
    groups, _ = grouped(
        [run for run in read_runs(path) if is_used(run)], torch_sources(), calibrated=False
    )
    made: list[TimedRun] = []
    for group in groups:
        usable_gib = load_device(group.key.device).profile.usable_bytes / GIB
        made += [one for one in _timed(group) if runs_regularly(one.run, usable_gib)]
        print(f"{group.key.source}: {group.key.config.name} on {group.key.device}", flush=True)
    return made


def _timed(group: RunGroup) -> list[TimedRun]:
    axes = {name: grid if _matters(name, group) else (1.0,) for name, grid in GRID.items()}
    shape = tuple(len(values) for values in axes.values())
    logs = np.empty((*shape, len(group.members)))
    graph = load_graph(group.key.config, group.key.setting, progress=quiet)
    programs: dict[tuple[float, float], ModelPrograms] = {}
    for at in itertools.product(*(range(size) for size in shape)):
        values = {name: axes[name][i] for i, name in zip(at, axes, strict=True)}
        machine = _machine(group, values)
        key = (values[TRAFFIC], values[TENSOR])
        if key not in programs:
            programs[key] = compile_model(graph, machine.runtime, group.key.setting.precision)
        made = predict(programs[key], machine, [member.case for member in group.members])
        logs[at] = np.log([each.step_s for each in made])
    whole = np.broadcast_to(logs, (*map(len, GRID.values()), len(group.members)))
    return [
        TimedRun(run=member.run, device=group.key.device, log_s=whole[..., i])
        for i, member in enumerate(group.members)
    ]


def _matters(name: str, group: RunGroup) -> bool:
    """Whether any run of a group depends on a constant."""
    cases = [member.case for member in group.members]
    if name == NETWORK:
        return any(case.num_gpus > group.machine.cluster.num_gpus_per_node for case in cases)
    if name == TENSOR:
        return any(stage.tp > 1 for case in cases for stage in case.layout.stages)
    # A compiled graph is traced as it runs.
    return name != TRAFFIC or not group.key.setting.compiled


def _machine(group: RunGroup, values: Mapping[str, float]) -> RunProfiles:
    machine = group.machine
    quantities = {name: calibrated(value, "on the grid") for name, value in values.items()}
    profiles = with_values((machine.device, machine.cluster, machine.runtime), quantities)
    return replace(machine, device=profiles[0], cluster=profiles[1], runtime=profiles[2])
