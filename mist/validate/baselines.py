"""What predictions must beat: step times from counted FLOPs alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

from mist.plans.memory_levels import REPEATS_ALL
from mist.validate.measured_runs import Run
from mist.validate.results import RunPrediction

Times = Mapping[str, float]


def constant_utilisation(rows: Iterable[RunPrediction]) -> Times:
    """Step times by run from one rate for each GPU and precision, fitted to all runs of it."""
    counted = [(row.run, flop) for row in rows if (flop := _flop_per_gpu(row.run)) is not None]
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run, flop in counted:
        if run.step_time_s and run.outcome == "ok":
            rates[run.gpu, run.precision].append(flop / run.step_time_s)
    rate = {key: median(found) for key, found in rates.items()}
    return {
        run.run_id: flop / rate[run.gpu, run.precision]
        for run, flop in counted
        if (run.gpu, run.precision) in rate
    }


def flops_and_bubble(rows: Iterable[RunPrediction]) -> Times:
    """FLOPs of a GPU, a third more with full recomputation, stretched by the pipeline's bubble.

    Of no unit: runs of one group are compared.
    """
    times: dict[str, float] = {}
    for row in rows:
        run, flop = row.run, _flop_per_gpu(row.run)
        if flop is not None and run.pp and run.grad_accum:
            again = 4 / 3 if run.activation_ckpt == REPEATS_ALL else 1.0
            bubble = 1 + (run.pp - 1) / ((run.vpp or 1) * run.grad_accum)
            times[run.run_id] = flop * again * bubble
    return times


def _flop_per_gpu(run: Run) -> float | None:
    """Model FLOPs of a step for each GPU: 6 a parameter and token, and attention's 12 L h s."""
    sizes = (run.params_b, run.global_batch, run.seq_len, run.n_gpus)
    if any(size is None for size in sizes):
        return None
    params_b, batch, seq, gpus = (float(size) for size in sizes if size is not None)
    attention = 12.0 * (run.n_layers or 0) * (run.hidden or 0) * seq
    return (6e9 * params_b + attention) * batch * seq / gpus
