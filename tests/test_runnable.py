"""A plan that is printed can be run: random jobs over all runtimes, spaces and schedules.

Every plan found, and every alternative printed beside it, passes all that `mist apply` refuses
(runtime torch) or what the framework's own sources refuse (`tests.framework_rules`). Whether the
refusals of `mist apply` are all there are is seen by dry runs (`tests.exec.test_runnable`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mist.errors import Infeasible, InputError
from mist.model.summary import LayerRun, ModelFacts, TpLimit
from mist.pareto.layouts import PricedLayout, plain_layout
from mist.plans.plan import Limits, Plan
from mist.plans.search_space import SPACES, SearchSpace
from mist.plans.workload import ScheduleKind
from mist.platform import load_platform
from mist.platform.profiles import load_runtime
from mist.rules.apply import refuse_unplayable
from mist.search.tune import smallest_peak, tune
from mist.symbolic.compile import compile_model
from mist.symbolic.estimate import estimate
from mist.symbolic.job import Job, make_job
from mist.symbolic.program import ModelPrograms
from mist.workflow.plan_against_job import plan_against
from mist.workflow.request import Question, unsearched_plan
from tests import framework_rules
from tests.toys import adamw_setting, toy_graph, toy_programs, toy_workload

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "profiles/runtimes").iterdir())
HOST = 1e9


def test_every_runtime_that_ships_has_its_oracle() -> None:
    assert sorted([*framework_rules.RUNTIMES, "torch"]) == SHIPPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A random job: its space, and the share of the least peak that it may use."""

    job: Job
    space: SearchSpace
    memory: float


@cache
def programs(runtime: str, kinds: int, tied: bool) -> ModelPrograms:
    """The costs of a toy of one or two kinds of layers, of any number of them."""
    graph = toy_graph((8,) if kinds == 1 else (1, 2), tied=tied)
    if runtime == "torch":
        return toy_programs(graph)
    return compile_model(graph, adamw_setting(load_runtime(runtime).profile))


def case(seed: int, runtimes: list[str], *, kinds: tuple[int, ...], ties: tuple[bool, ...]) -> Case:
    """Of any size: odd numbers of layers, batches and heads, one node or two."""
    rng = np.random.default_rng(seed)
    runtime = runtimes[seed % len(runtimes)]
    known = programs(runtime, int(rng.choice(kinds)), bool(rng.choice(ties)))
    facts = shaped(rng, known.facts)
    num_gpus = int(rng.choice([1, 2, 4, 8, 16]))
    gpu = str(rng.choice(["h100-sxm", "l4", "a100-sxm-40"]))
    platform = load_platform(num_gpus=num_gpus, gpu=gpu, cluster=None, runtime=runtime)
    batch = num_gpus * int(rng.choice([1, 2, 3, 4, 5, 6, 8]))
    workload = toy_workload(seq_len=int(rng.choice([96, 250, 512, 2048])), global_batch=batch)
    job = make_job(replace(known, facts=facts), platform, workload)
    return Case(job=job, space=spaced(rng, job), memory=float(rng.choice([1.03, 1.2, 1.5, 2.5, 8])))


def shaped(rng: np.random.Generator, facts: ModelFacts) -> ModelFacts:
    """The same blocks in any number, divided by one, by any or by no number of ranks."""
    counts = rng.integers(1, 10 if len(facts.layers) == 1 else 5, len(facts.layers))
    layers = tuple(LayerRun(block=i, count=int(count)) for i, count in enumerate(counts))
    limits = [(1,), (2,), (3, 6), (4, 12), (8,), (64,)][rng.integers(6)]
    labels = ("key/value heads", "attention heads")
    known = tuple(TpLimit(label=word, size=n) for word, n in zip(labels, limits, strict=False))
    return replace(
        facts,
        layers=layers,
        tp_limits=None if rng.uniform() < 0.05 else known,
        sequential=bool(rng.uniform() < 0.95),
    )


def spaced(rng: np.random.Generator, job: Job) -> SearchSpace:
    """A space of any name, or one schedule, with pipelines asked for in half of the cases."""
    space = SPACES[str(rng.choice(sorted(SPACES)))]
    kinds = job.platform.runtime.knobs.schedules
    if rng.uniform() < 0.5 and kinds:
        space = replace(SPACES["mist"], schedules=(kinds[rng.integers(len(kinds))],))
    sizes = [n for n in (2, 4, 8) if job.platform.num_gpus % n == 0 and n <= job.num_layers]
    if rng.uniform() < 0.7 and sizes and space.pp is None:
        space = replace(space, pp=(int(rng.choice(sizes)),))
    return space


def layouts(case: Case) -> tuple[PricedLayout, ...]:
    """The plan and its alternatives; none where nothing fits or the space is empty."""
    try:
        least = smallest_peak(case.job, case.space, host_bytes=HOST).peak_bytes
        limits = Limits(device_bytes=case.memory * least, host_bytes=HOST)
        found = tune(
            case.job, case.space, limits=limits, num_alternatives=3, progress=lambda _: None
        )
    except (Infeasible, InputError):
        return ()
    return (found.best, *found.others)


def plan_of(job: Job, layout: PricedLayout) -> Plan:
    """A layout as `mist plan` writes it."""
    plain = plain_layout(job, layout)
    question = Question(
        model="toy.py", num_gpus=job.platform.num_gpus, runtime=job.platform.runtime.name
    )
    return unsearched_plan(job, question, plain, estimate(job, plain))


def judge(cases: Iterator[Case], num_jobs: int) -> Counter[str]:
    """Count the plans of each runtime and of each thing that makes a plan hard to run.

    Of the first jobs that have any plan, this many: a random space may be empty, or nothing fit.
    """
    seen: Counter[str] = Counter()
    for each in cases:
        if seen["jobs"] == num_jobs:
            break
        plans = [plan_of(each.job, layout) for layout in layouts(each)]
        seen["jobs"] += bool(plans)
        for plan in plans:
            assert not plan_against(plan, each.job)
            if plan.runtime == "torch":
                refuse_unplayable(plan, each.job.facts)
            else:
                assert not framework_rules.refusals(plan, each.job.facts), plan
            seen.update(["plans", plan.runtime, *traits(plan, each.job)])
    return seen


def traits(plan: Plan, job: Job) -> Iterator[str]:
    several = len(plan.stages) > 1
    if several:
        yield f"{plan.schedule.kind}"
        yield "tied pipeline" if job.facts.tied else "pipeline"
    if len({(s.dp, s.tp, s.zero) for s in plan.stages}) > 1:
        yield "unlike stages"
    if len({s.num_layers for s in plan.stages}) > 1:
        yield "uneven stages"
    if any(s.offload.optimizer or s.offload.activations for s in plan.stages):
        yield "offload"
    if any(s.num_full for s in plan.stages):
        yield "full"


def test_plans_of_random_jobs_can_be_run() -> None:
    """Two runtimes: the one that `mist apply` runs, and the one with most rules of its own."""
    names = ["torch", "megatron"]
    cases = (case(seed, names, kinds=(1,), ties=(False, True)) for seed in range(30))
    seen = judge(cases, 8)
    assert seen["jobs"] == 8


@pytest.mark.slow
def test_plans_of_random_jobs_of_every_runtime_can_be_run() -> None:
    cases = (case(seed, SHIPPED, kinds=(1, 2), ties=(False, True)) for seed in range(1000, 1600))
    seen = judge(cases, 300)
    print(seen)
    assert seen["jobs"] == 300  # if half of all jobs have no plan, the search has lost some
    assert all(seen[name] >= 20 for name in SHIPPED)
    for trait in (*ScheduleKind, "tied pipeline", "unlike stages", "uneven stages", "offload"):
        assert seen[trait] >= 5, trait
