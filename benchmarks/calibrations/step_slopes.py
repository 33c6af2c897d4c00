"""Steps of published runs as functions of the constants that are fitted to them.

    step(constants) = step on a grid of device and cluster figures, interpolated
                    + for each other constant: how the step changes with it alone

The grid is of what changes a step together: speed and network. Everything is expanded around the
calibrations that ship: `python benchmarks/calibrations/step_slopes.py RUNS.csv SLOPES.json` writes
one line a run, and goes on where it was stopped.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mist.plans.numerics import FP8
from mist.plans.workload import Optimizer
from mist.platform.calibration import calibrated, figure_at
from mist.platform.profiles import find_calibration, load_device
from mist.symbolic.load_programs import compile_graph, quiet
from mist.trace import load_graph
from mist.validate.blank_columns import filled_runs
from mist.validate.cases import RunGroup, grouped, machine_of
from mist.validate.measured_runs import Run, read_runs
from mist.validate.predict import RunProfiles, predict
from mist.validate.predictions import GIB
from mist.validate.scores import TIERS, runs_regularly
from mist.validate.sources import load_sources

Floats = NDArray[np.float64]
Values = Mapping[str, float]

SPEED = "device.tensor_time_scale"
NETWORK = "cluster.network.efficiency_ratio"
HOP = "cluster.network.hop_s"
MEMORY = "runtime.kernels.memory_time_scale"
ATTENTION = "runtime.kernels.attention_time_scale"
SCORES = "runtime.kernels.scores_time_scale"
LAYER = "runtime.host.layer_launch_s"
TENSOR_LAUNCH = "runtime.host.tensor_parallel_launch_s"
PIPELINE_LAUNCH = "runtime.host.pipeline_launch_s"
MICRO_BATCH = "runtime.host.micro_batch_launch_s"
STEP = "runtime.host.step_s"
TENSOR = "runtime.overlap.tensor_parallel_time_scale"

PATHS = (SPEED, NETWORK, HOP, MEMORY, ATTENTION, SCORES, LAYER, TENSOR_LAUNCH, PIPELINE_LAUNCH,
         MICRO_BATCH, STEP, TENSOR)  # fmt: skip
# Of the bound figures, values of the whole grid; of the others, factors of the expansion's value.
GRID = {
    SPEED: (0.85, 1.0, 1.15, 1.35, 1.6, 2.0),
    NETWORK: (0.15, 0.25, 0.4, 0.6, 1.0),
    HOP: (5e-6, 2e-5, 8e-5),
}
TIMED = ("bf16", "fp16", FP8)  # other formats have datasheet rates alone
FACTORS = (0.5, 0.8, 1.0, 1.25, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """A run's step around `base`.

    `log_s` [speeds, networks, hops]: logarithm of seconds on the grid. `profiles`: of each other
    constant, at which values the step is how many times that of the base.
    """

    run_id: str
    source: str
    runtime: str
    device: str
    base: Values
    log_s: Floats
    profiles: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]


def is_timed(run: Run) -> bool:
    """Whether a run says how long a step takes: dense training in 16 or 8 bits."""
    ran = run.outcome == "ok" and run.step_time_s is not None and run.tier in TIERS
    dense = not run.arch.startswith("moe") and run.task in ("", "pretrain", "sft")
    return ran and dense and run.precision in TIMED


def timed_groups(runs: Sequence[Run]) -> list[RunGroup]:
    """Groups of runs whose times are compared, each with its members that ran regularly."""
    sources = load_sources()
    cases = [filled_runs(run, sources, has_stages=False) for run in runs if is_timed(run)]
    # A run with blanks is one of several. Of such only those in fp8 count, as what they likeliest
    # are: no source of fp8 says what it recomputes.
    timed = [each[0].run for each in cases if len(each) == 1 or each[0].run.precision == FP8]
    groups, _ = grouped(timed, sources, calibrated=False)
    found = []
    for group in groups:
        usable_gib = load_device(group.key.device).profile.usable_bytes / GIB
        members = [one for one in group.members if runs_regularly(one.run, usable_gib)]
        if members:
            found.append(replace(group, members=tuple(members)))
    return found


def machine_at(group: RunGroup, values: Values) -> RunProfiles:
    """The group's profiles with these constants."""
    quantities = {name: calibrated(value, "being fitted") for name, value in values.items()}
    return machine_of(group.key, load_sources(), quantities)


class GroupModel:
    """The programs of a group's model, for any constants."""

    def __init__(self, group: RunGroup) -> None:
        self.group = group
        self.base = base_of(group)
        self._programs = compile_graph(
            load_graph(group.key.config, group.key.setting, progress=quiet),
            group.key.setting,
            machine_at(group, self.base).runtime,
            Optimizer.ADAMW,
        )

    def steps_s(self, values: Values) -> Floats:
        """Predicted seconds of a step of each member."""
        cases = [member.case for member in self.group.members]
        made = predict(self._programs, machine_at(self.group, values), cases)
        return np.array([each.step_s for each in made])


def expansions(model: GroupModel) -> list[Expansion]:
    """The steps of a group's runs around the calibration that ships."""
    group, base = model.group, model.base
    axes = [grid if _matters(name, group) else (base[name],) for name, grid in GRID.items()]
    log_s = np.empty((*map(len, axes), len(group.members)))
    for index in itertools.product(*(range(len(axis)) for axis in axes)):
        point = {name: axes[k][i] for k, (name, i) in enumerate(zip(GRID, index, strict=True))}
        log_s[index] = np.log(model.steps_s({**base, **point}))
    base_s, profiles = model.steps_s(base), {}
    for name in base:
        if name in GRID or not _matters(name, group):
            continue
        at = sorted({base[name] * factor for factor in FACTORS})
        profiles[name] = (at, [model.steps_s({**base, name: value}) / base_s for value in at])
    source = group.key.origin
    return [
        Expansion(
            run_id=member.run.run_id,
            source=group.key.source,
            runtime=source.runtime,
            device=group.key.device,
            base=base,
            log_s=log_s[..., i],
            profiles={
                name: (tuple(at), tuple(float(ratio[i]) for ratio in ratios))
                for name, (at, ratios) in profiles.items()
            },
        )
        for i, member in enumerate(group.members)
    ]


# What the runs of a runtime say something of, beside the figures of GRID.
SAID = {
    "nanotron": (MEMORY, LAYER, TENSOR_LAUNCH, PIPELINE_LAUNCH, STEP, TENSOR),
    "aleph": (MEMORY, ATTENTION, SCORES, TENSOR),
    "megatron-deepspeed": (MEMORY, LAYER, MICRO_BATCH, TENSOR),
    "fsdp1": (MEMORY, ATTENTION),
    "megatron": (MEMORY, TENSOR),
    "torch": (MEMORY, TENSOR, LAYER),
    "torchtitan": (MEMORY, TENSOR),
    "torchtune": (MEMORY,),
    "mist-fp16": (MEMORY, TENSOR),
    "deepspeed-zero3": (MEMORY,),
}
STARTS = {PIPELINE_LAUNCH: 1e-3, MICRO_BATCH: 1e-3, STEP: 0.03, TENSOR_LAUNCH: 2e-3}


def base_of(group: RunGroup) -> dict[str, float]:
    """Where the steps of a group are expanded: the calibration, else the profiles."""
    source = group.key.origin
    machine = machine_of(group.key, load_sources(), {})
    held = (machine.device, machine.cluster, machine.runtime)
    calibration = find_calibration(source.runtime, machine.device)
    values = {} if calibration is None else calibration.profile.values
    base = {}
    for name in (*GRID, *SAID[source.runtime]):
        quantity = values.get(name) or figure_at(held, name)
        base[name] = quantity.value or STARTS[name]
    return base


def _matters(name: str, group: RunGroup) -> bool:
    """Whether any run of a group can depend on a constant."""
    cases = [member.case for member in group.members]
    stages = [stage for case in cases for stage in case.layout.stages]
    spans = any(case.num_gpus > group.machine.cluster.num_gpus_per_node for case in cases)
    if name in (NETWORK, HOP):
        return spans
    if name in (TENSOR, TENSOR_LAUNCH):
        return any(stage.tp > 1 for stage in stages)
    if name == PIPELINE_LAUNCH:
        return any(len(case.layout.stages) > 1 for case in cases)
    if name == SCORES:
        return group.key.setting.attention == "math"
    if name == ATTENTION:
        return group.key.setting.attention != "math"
    return name != MEMORY or not group.key.setting.compiled


def main(path: Path, out: Path) -> None:
    groups = timed_groups(read_runs(path))
    done = set()
    if out.exists():
        done = {json.loads(line)["run_id"] for line in out.read_text().splitlines()}
    for number, group in enumerate(groups, start=1):
        if group.members[0].run.run_id in done:
            continue
        rows = [
            json.dumps(asdict(replace(each, log_s=each.log_s.tolist())))
            for each in expansions(GroupModel(group))
        ]
        with out.open("a") as file:
            file.write("\n".join(rows) + "\n")
        key = group.key
        words = f"{number} of {len(groups)}: {key.source}, {key.config.name} on {key.device}"
        print(words, len(rows), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
