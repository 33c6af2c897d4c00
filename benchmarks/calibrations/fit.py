"""Fits profiles/calibrations to measured runs: `python benchmarks/calibrations/fit.py RUNS.csv`.

For developers. Each row of `FITS` names the constants of one runtime on one device and the source
they are fitted to: few, physical, between bounds (`mist.calibrate.fit`).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mist.calibrate.fit import Range, fitted
from mist.model.graph import ModelGraph
from mist.platform.calibration import Calibration, calibrated, dump_calibration
from mist.platform.profiles import load_device
from mist.platform.quantity import Quantity
from mist.symbolic.compile import compile_model
from mist.symbolic.load_programs import quiet
from mist.symbolic.program import ModelPrograms
from mist.trace import load_graph
from mist.validate.cases import Key, RunGroup, grouped
from mist.validate.measured_runs import Run, read_runs
from mist.validate.predict import predict
from mist.validate.predictions import GIB
from mist.validate.scores import TIERS, runs_regularly
from mist.validate.sources import load_sources

FOLDER = Path(__file__).parents[2] / "profiles/calibrations"
FITTING = "being fitted"
Constants = Mapping[str, tuple[float, float, float]]  # start, least, most

SPEED: Constants = {"device.tensor_time_scale": (1.1, 0.7, 1.8)}
KERNELS: Constants = {
    "runtime.kernels.memory_time_scale": (0.8, 0.3, 3.0),
    "runtime.kernels.attention_time_scale": (1.0, 0.5, 2.5),
}
MEMORY: Constants = {"runtime.kernels.memory_time_scale": (0.7, 0.3, 3.0)}
HOST: Constants = {
    "runtime.host.layer_launch_s": (1.5e-3, 7.5e-4, 4e-3),
    "runtime.host.micro_batch_launch_s": (1e-3, 1e-5, 5e-3),
}
NANOTRON: Constants = {
    "runtime.kernels.memory_time_scale": (0.7, 0.2, 3.0),
    "runtime.host.layer_launch_s": (1.5e-3, 7.5e-4, 4e-3),
    "runtime.host.tensor_parallel_launch_s": (3e-3, 1e-4, 1e-2),
    "runtime.host.pipeline_launch_s": (1e-3, 1e-5, 1e-2),
    "runtime.host.step_s": (0.05, 1e-3, 0.3),
    "runtime.overlap.tensor_parallel_time_scale": (0.8, 0.3, 2.0),
    "runtime.overlap.gradient_all_reduce_ratio": (0.7, 0.05, 1.0),
    "runtime.overlap.layers_per_collective": (3.0, 1.0, 32.0),
    "cluster.network.efficiency_ratio": (0.4, 0.1, 1.0),
    "cluster.network.hop_s": (6e-5, 5e-6, 2e-4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Constants of one runtime on one device, and the runs that say them."""

    runtime: str
    device: str
    sources: tuple[str, ...]
    constants: Constants


FITS = (
    Fit(runtime="nanotron", device="h100-sxm", sources=("hf-playbook-sweep",),
        constants=SPEED | NANOTRON),
    Fit(runtime="aleph", device="a100-sxm-80", sources=("hagemann23",),
        constants=SPEED | KERNELS | {
            "runtime.kernels.scores_time_scale": (1.0, 0.3, 3.0),
            "runtime.overlap.tensor_parallel_time_scale": (1.0, 0.3, 3.0)}),
    Fit(runtime="megatron-deepspeed", device="a100-sxm-80", sources=("vtrain-single",),
        constants=SPEED | HOST),
    Fit(runtime="fsdp1", device="a100-sxm-80", sources=("llm-foundry",), constants=SPEED | KERNELS),
    Fit(runtime="fsdp1", device="h100-sxm", sources=("llm-foundry",), constants=SPEED | KERNELS),
    Fit(runtime="torchtitan", device="a100-sxm-80", sources=("torchtitan",), constants=SPEED),
    Fit(runtime="torchtitan", device="h100-sxm-500w-hbm2e", sources=("torchtitan",),
        constants=SPEED),
    Fit(runtime="torchtune", device="a100-sxm-80", sources=("torchtune",), constants=SPEED),
    Fit(runtime="megatron", device="a100-sxm-80", sources=("sc21-megatron",),
        constants=SPEED | MEMORY),
    Fit(runtime="megatron", device="h100-sxm", sources=("nemo-docs", "megatron-bridge"),
        constants=SPEED | MEMORY),
    Fit(runtime="megatron", device="gb200", sources=("megatron-bridge",), constants=SPEED),
    Fit(runtime="megatron", device="b200", sources=("megatron-bridge",), constants=SPEED),
    Fit(runtime="mist-fp16", device="l4", sources=("mist-l4",), constants=SPEED),
)  # fmt: skip


class Judge:
    """Log errors of a fit's runs at given constants."""

    def __init__(self, fit: Fit, runs: Sequence[Run]) -> None:
        groups, _ = grouped(runs, load_sources(), calibrated=False)
        self.fit = fit
        self.groups = [g for g in groups if g.key.device == fit.device]
        self._graphs: dict[Key, ModelGraph] = {}
        self._programs: dict[object, ModelPrograms] = {}

    def errors(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """log(predicted / measured) of every run."""
        return np.concatenate([self._of(group, values) for group in self.groups])

    def _of(self, group: RunGroup, values: Mapping[str, float]) -> NDArray[np.float64]:
        machine = group.machine
        held = (machine.device, machine.cluster, machine.runtime)
        profiles = calibration(self.fit, values).applied(held)
        device, cluster, runtime = profiles
        if group.key.setting.compiled or group.key.attention:  # a run's own kernels scale the rest
            kernels = _rescaled(group, values)
            runtime = replace(runtime, kernels=replace(runtime.kernels, **kernels))
        made = predict(
            self._compiled(group, runtime),
            replace(machine, device=device, cluster=cluster, runtime=runtime),
            [member.case for member in group.members],
        )
        real = [member.run.step_time_s for member in group.members]
        return np.log([each.step_s / r for each, r in zip(made, real, strict=True) if r])

    def _compiled(self, group: RunGroup, runtime: object) -> ModelPrograms:
        key = (group.key, runtime)
        text = str(key)
        if text not in self._programs:
            if len(self._programs) > 64:
                self._programs.clear()
            self._programs[text] = compile_model(
                self._graph(group.key), runtime, group.key.setting.precision
            )
        return self._programs[text]

    def _graph(self, key: Key) -> ModelGraph:
        if key not in self._graphs:
            self._graphs[key] = load_graph(key.config, key.setting, progress=quiet)
        return self._graphs[key]


def _rescaled(group: RunGroup, values: Mapping[str, float]) -> dict[str, Quantity]:
    """Scales of kernels: the constant times what the run's own kernel is of the traced one."""
    attention = load_sources().attention[group.key.attention]
    found: dict[str, Quantity] = {}
    scale = values.get("runtime.kernels.attention_time_scale")
    if scale is not None:
        found["attention_time_scale"] = calibrated(
            scale * attention.attention_time_scale.value, FITTING
        )
    scale = values.get("runtime.kernels.scores_time_scale")
    if scale is not None:
        found["scores_time_scale"] = calibrated(scale * attention.scores_time_scale.value, FITTING)
    if group.key.setting.compiled:
        found["memory_time_scale"] = calibrated(1.0, FITTING)
    return found


def calibration(
    fit: Fit,
    values: Mapping[str, float],
    source: str = FITTING,
    interval: tuple[float, float] = (1.0, 1.0),
) -> Calibration:
    """The constants as a calibration."""
    return Calibration(
        schema="mist.calibration/1",
        runtime=fit.runtime,
        device=fit.device,
        step_low_ratio=calibrated(interval[0], source),
        step_high_ratio=calibrated(interval[1], source),
        values={name: calibrated(value, source) for name, value in values.items()},
    )


def is_fitted_to(run: Run, fit: Fit, usable_gib: float) -> bool:
    """Whether a run's time says something of a fit's constants."""
    ran = run.outcome == "ok" and run.step_time_s is not None and run.tier in TIERS
    return run.source in fit.sources and ran and runs_regularly(run, usable_gib)


def main(path: Path, wanted: Sequence[str]) -> None:
    runs = read_runs(path)
    for fit in FITS:
        if wanted and fit.runtime not in wanted:
            continue
        usable_gib = load_device(fit.device).profile.usable_bytes / GIB
        judge = Judge(fit, [run for run in runs if is_fitted_to(run, fit, usable_gib)])
        if not judge.groups:
            continue
        ranges = {
            name: Range(start=start, least=least, most=most)
            for name, (start, least, most) in fit.constants.items()
        }
        values, errors = fitted(judge.errors, ranges)
        off = np.abs(np.expm1(errors))
        quality = f"{100 * np.median(off):.1f} / {100 * np.percentile(off, 90):.1f}"
        source = (
            f"fitted to {len(errors)} runs of {', '.join(fit.sources)} "
            f"({len(values)} constants; error median / p90 {quality} %); in-sample"
        )
        low, high = np.exp(-np.percentile(errors, [90, 10])).tolist()
        found = calibration(fit, values, source, (low, high))
        text = dump_calibration(found, "Written by benchmarks/calibrations/fit.py.")
        (FOLDER / f"{fit.runtime}-{fit.device}.yaml").write_text(text)
        print(fit.runtime, fit.device, source, flush=True)
        print("   ", {name: float(f"{value:.4g}") for name, value in values.items()}, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
