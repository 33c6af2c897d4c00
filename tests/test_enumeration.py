"""The search against a full enumeration of a real job: GPT-1.3B on two L4, every stage there is.

Nothing is structured here: each group, strategy, offload tuple, layer count and mix of two memory
levels is evaluated by the compiled stage formulas as one flat table, in the paper's own form of the
step time, (G - 1) max t + sum t + max (d_i - sum_{j<i} t_j).
"""

import itertools
import math

import numpy as np
import pytest

from mist.errors import Infeasible
from mist.pareto.strategies import divisors
from mist.plans.plan import Limits
from mist.plans.search_space import OFFLOADED, PAPER_RATIOS, SPACES
from mist.plans.workload import MemoryLevel
from mist.search.tune import tune
from mist.symbolic.columns import position_columns, strategy_columns
from mist.symbolic.job import Job
from mist.symbolic.load_programs import quiet
from mist.workflow.request import Question, compiled, job_of, limits_of

GPT_1_3B = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
    "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 2048,
}  # fmt: skip


def strategies(job: Job, pp: int, num_micro_batches: int) -> dict[str, np.ndarray]:
    """Every (tp, dp, micro-batch, zero, four ratios) that keeps the rules, as columns [K]."""
    per_stage, batch = job.platform.num_gpus // pp, job.workload.global_batch
    rows = []
    ratios = [
        away
        for away in itertools.product(*(PAPER_RATIOS[name] for name in OFFLOADED))
        if away[0] == away[1]  # torch offloads weights and gradients of a layer together
    ]
    for tp, zero, away in itertools.product(divisors(per_stage), range(4), ratios):
        dp = per_stage // tp
        if batch % (dp * num_micro_batches) or (dp == 1 and zero and not any(away)):
            continue
        rows.append((tp, dp, batch // dp // num_micro_batches, zero, *away))
    table = np.array(rows).T if rows else np.zeros((8, 0))
    columns = dict(zip(("tp", "dp", "micro_batch", "zero", *OFFLOADED), table, strict=True))
    whole = {name: columns[name].astype(int) for name in ("tp", "dp", "micro_batch", "zero")}
    columns |= whole
    kept = np.ones(table.shape[1], dtype=bool)
    pipeline = {
        "num_stages": pp, "num_micro_batches": num_micro_batches, "schedule": "1f1b", "chunks": 1,
    }  # fmt: skip
    for rule in job.rules if rows else ():
        kept &= rule.mask(
            {**columns, **pipeline, "dp_replicate": np.ones_like(columns["dp"]), "head": 0}
        )
    return {name: column[kept] for name, column in columns.items()}


def stages(
    job: Job, pp: int, num_micro_batches: int, position: int, limits: list[Limits]
) -> dict[tuple[int, int], np.ndarray]:
    """(t, d) of everything that fits, by limit and layer count: [2, N], dominated ones too."""
    own = strategies(job, pp, num_micro_batches)
    if not len(own["tp"]):
        return {}
    terms = job.cost.terms(strategy_columns(job.placement, own, num_stages=pp))
    terms = {name: term[:, None] for name, term in terms.items()}
    size = job.platform.num_gpus // pp
    devices = np.array([(i * size, size) for i in range(pp)])
    columns = position_columns(
        job.placement, devices, 1, num_micro_batches
    )  # one chunk: layers are alike
    place = {name: np.asarray(column)[position] for name, column in columns.items()}
    found = {}
    longest = job.num_layers - pp + 1
    for count in range(1, longest + 1) if pp > 1 else [job.num_layers]:
        mixes = [
            mix
            for mix in itertools.product(range(count + 1), repeat=3)
            if sum(mix) == count and sum(n > 0 for n in mix) <= 2
        ]
        counts = {
            f"{level}_0": column
            for level, column in zip(MemoryLevel, np.array(mixes).T, strict=True)
        }
        out = job.cost.search({**terms, **place, **counts})
        for at, limit in enumerate(limits):
            fits = out["peak_bytes"] <= limit.device_bytes
            fits &= out["host_bytes"] <= limit.host_bytes
            t, d = out["stable_s"][fits], (out["lone_s"] - out["stable_s"])[fits]
            found[at, count] = np.stack([t, d])
    return found


def undominated(points: np.ndarray) -> np.ndarray:
    """Points that none beats in (t, t + d): one sort and a running minimum."""
    t, u = points[0], points[0] + points[1]
    order = np.lexsort((u, t))
    keep = u[order] < np.minimum.accumulate(np.concatenate(([np.inf], u[order])))[:-1]
    return points[:, order[keep]]


def paper_step(g: int, first: np.ndarray, second: np.ndarray | None) -> float:
    """The least step of all combinations, in the paper's form."""
    if second is None:
        t, d = first
        return float(((g - 1) * t + t + d).min(initial=math.inf))
    (t0, d0), (t1, d1) = first[:, :, None], second[:, None, :]
    step = (g - 1) * np.maximum(t0, t1) + t0 + t1 + np.maximum(d0, d1 - t0)
    return float(step.min(initial=math.inf))


def enumerated(job: Job, limits: list[Limits]) -> tuple[list[float], int]:
    """The least step under each limit, and how many stages were tried."""
    best, tried = [math.inf] * len(limits), 0
    for g in divisors(job.workload.global_batch):
        alone = stages(job, 1, g, 0, limits)
        first, second = (stages(job, 2, g, i, limits) if g >= 2 else {} for i in (0, 1))
        for at in range(len(limits)):
            tried += sum(p.shape[1] for f in (alone, first, second) for p in f.values())
            if alone:
                best[at] = min(best[at], paper_step(g, alone[at, job.num_layers], None))
            for count in range(1, job.num_layers) if first and second else ():
                pair = (first[at, count], second[at, job.num_layers - count])
                best[at] = min(best[at], paper_step(g, *map(undominated, pair)))
    return best, tried


@pytest.mark.slow
def test_gpt_1_3b_on_two_l4_equals_its_full_enumeration(tmp_path_factory: object) -> None:
    import json
    from pathlib import Path

    path = Path(tmp_path_factory.mktemp("gpt")) / "gpt3-1.3b.json"  # type: ignore[attr-defined]
    path.write_text(json.dumps(GPT_1_3B))
    asked = Question(model=str(path), num_gpus=2, gpu="l4", seq_len=2048, global_batch=32)
    job = job_of(asked, compiled(asked, quiet))
    whole = limits_of(job, asked)
    limits = [
        Limits(device_bytes=share * whole.device_bytes, host_bytes=whole.host_bytes)
        for share in (0.4, 0.55, 0.75, 1.0)
    ]
    want, tried = enumerated(job, limits)
    assert tried > 1_000_000
    for limit, least in zip(limits, want, strict=True):
        try:
            found = tune(
                job, SPACES["paper"], limits=limit, num_alternatives=0, progress=lambda _: None
            ).best.step_s
        except Infeasible:
            found = math.inf
        assert found == pytest.approx(least, rel=1e-9)
