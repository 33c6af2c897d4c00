"""What to make least, and how many GPUs to rent: objectives against every layout and every run."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mist.errors import Infeasible, InputError
from mist.pareto.least_memory import leanest
from mist.pareto.strategies import divisors
from mist.plans.file import dump_plan
from mist.plans.objectives import Candidate, Objective, chosen
from mist.plans.plan import Estimate, Layout, StagePlan
from mist.plans.search_space import NO_RATIOS, SPACES, SearchSpace
from mist.plans.workload import MemoryLevel, ScheduleKind
from mist.platform.profiles import load_cluster
from mist.symbolic.job import Job
from mist.workflow.cluster_choice import Rented, offer_of, rent
from mist.workflow.gpu_counts import counts_of
from mist.workflow.planning import Effort, Planned, make_plan
from mist.workflow.request import Question
from tests.fast_cases import first_fast
from tests.judging import outputs
from tests.platform.samples import other_one
from tests.sample_plans import estimate_of, stage_estimate
from tests.test_tune import SCHEDULES, options_of, shares_ends
from tests.toys import toy_graph, toy_job
from tests.workflow.answering import answer_with

RATIOS = {**NO_RATIOS, "optimizer": (0.0, 0.5, 1.0)}
SPACE = SearchSpace(offload=RATIOS)
QUESTION = Question(model="toy.py", num_gpus=1, global_batch=16)
PLAIN = SearchSpace(
    pp=(1, 2),
    tp=(1, 2),
    micro_batch=(1,),
    offload=NO_RATIOS,
    schedules=(ScheduleKind.ONE_F_ONE_B,),
    unlike_stages=False,
)


def held(job: Job, options: list[StagePlan], pp: int, g: int, position: int) -> np.ndarray:
    """Peak and host bytes of each option, beside others like it: [2, options]."""
    found = []
    for option in options:
        other = replace(option, devices=((1 - position) * option.devices[1], option.devices[1]))
        pipeline = (option, other) if position == 0 else (other, option)
        columns = outputs(
            job, Layout(stages=pipeline[:pp], num_micro_batches=g, schedule=SCHEDULES[1][0])
        )
        found.append([columns[name][position] for name in ("peak_bytes", "host_bytes")])
    return np.array(found).reshape(-1, 2).T


def least_of_all(
    job: Job, space: SearchSpace, hosts: Sequence[float], *, alike: bool = False
) -> list[float]:
    """The least peak of one or two stages for each host memory, by trying every layout."""
    best, num_layers = [math.inf] * len(hosts), job.num_layers
    for pp, g in itertools.product(space.pp or (1, 2), divisors(job.workload.global_batch)):
        cuts = range(1, num_layers) if pp == 2 else (num_layers,)
        for cut in (num_layers // pp,) if alike else cuts:
            stages, options_of_both = [], []
            for position, run in enumerate([range(cut), range(cut, num_layers)][:pp]):
                devices = (position * job.platform.num_gpus // pp, job.platform.num_gpus // pp)
                options = options_of(job, space, SCHEDULES[1][0], pp, g, devices, run)
                options = [one for one in options if allows(space, one, whole=alike)]
                options_of_both.append(options)
                stages.append(held(job, options, pp, g, position))
            for at, host_bytes in enumerate(hosts):
                own = [np.where(host <= host_bytes, peak, np.inf) for peak, host in stages]
                if alike:  # the options of both stages are in the same order
                    own = [np.max(own, axis=0)]
                if job.facts.tied and pp == 2:
                    worst = least_of_ends(options_of_both, own)
                else:
                    worst = max(float(peaks.min(initial=math.inf)) for peaks in own)
                best[at] = min(best[at], worst)
    return best


def least_of_ends(options: list[list[StagePlan]], peaks: list[np.ndarray]) -> float:
    """The least peak of two stages that share a matrix, each pair of options looked at."""
    pairs = itertools.product(
        *(list(zip(*both, strict=True)) for both in zip(options, peaks, strict=True))
    )
    return min(
        (max(first[1], last[1]) for first, last in pairs if shares_ends([first[0], last[0]])),
        default=math.inf,
    )


def allows(space: SearchSpace, stage: StagePlan, *, whole: bool) -> bool:
    """Whether a space has what a stage does; `whole`: all its layers at one level."""
    levels = [level for level in MemoryLevel if stage.num_at(level)]
    return (
        stage.zero in space.zero
        and (space.tp is None or stage.tp in space.tp)
        and set(levels) <= set(space.levels)
        and (len(levels) == 1 or not whole)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts", [(1, 2), *(pytest.param(c, marks=pytest.mark.slow) for c in [(3,), (2, 1)])]
)
def test_the_least_memory_is_that_of_every_layout(counts: tuple[int, ...]) -> None:
    """Unlike stages, unlike layers, and host memory for nothing, for a part and for all."""
    job = toy_job(toy_graph(counts, vocab=4096, hidden=2048), 2, global_batch=2)
    hosts = (0.0, *(share * 4e9 for share in (0.05, 0.1, 0.15, 0.2, 0.3)), 1e12)
    want = least_of_all(job, SPACE, hosts)
    assert want == sorted(want, reverse=True)
    assert len(set(want)) >= 3
    found = [leanest(job, SPACE, host_bytes=host).peak_bytes for host in hosts]
    assert found == pytest.approx(want, rel=1e-12)  # one sum, in another order


@pytest.mark.slow
def test_the_least_memory_of_a_tied_model_is_that_of_every_layout() -> None:
    graph = toy_graph((1, 1), vocab=4096, hidden=2048, tied=True)
    job = toy_job(graph, 4, global_batch=2)
    space = replace(SPACE, pp=(2,), offload=NO_RATIOS)
    (want,) = least_of_all(job, space, [1e12])
    assert leanest(job, space, host_bytes=1e12).peak_bytes == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", ["3d", "deepspeed", "fsdp"])
def test_the_least_memory_of_like_stages(name: str) -> None:
    job = toy_job(toy_graph((4,), vocab=4096), 2, global_batch=2)
    (want,) = least_of_all(job, SPACES[name], [1e12], alike=True)
    assert leanest(job, SPACES[name], host_bytes=1e12).peak_bytes == pytest.approx(want, rel=1e-12)


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is the toy of eight layers."""
    answer_with(replace(toy_graph(hidden=2048), max_seq_len=2048), monkeypatch)


def told(gpus: str = "8", clusters: str | None = None, **said: object) -> Rented:
    """What is rented for a toy."""
    offer = offer_of(gpus, clusters, said.get("price"), said.get("tokens"))  # type: ignore[arg-type]
    objective = said.get("objective", Objective.THROUGHPUT)
    space = said.get("space", PLAIN)
    effort = Effort(objective=objective, num_alternatives=2)  # type: ignore[arg-type]
    return rent(replace(QUESTION, gpu=said.get("gpu")), offer, space, effort)  # type: ignore[arg-type]


def peak_of(planned: Planned) -> int:
    return max(stage.peak_bytes for stage in planned.plan.estimate.stages)


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize("space", first_fast([PLAIN, SPACE]), ids=["alike", "unlike"])
def test_the_plan_of_least_memory(space: SearchSpace) -> None:
    question = replace(QUESTION, num_gpus=4)
    lean = make_plan(question, space, Effort(objective=Objective.MEMORY))
    fast = make_plan(question, space)
    job = toy_job(toy_graph(hidden=2048), 4, global_batch=16)
    assert peak_of(lean) == round(leanest(job, space, host_bytes=1e12).peak_bytes)
    assert peak_of(lean) < peak_of(fast)
    assert lean.plan.estimate.step_s > fast.plan.estimate.step_s
    assert all(other.peak_bytes <= peak_of(lean) for other in lean.plan.alternatives)
    assert all(other.step_s >= lean.plan.estimate.step_s for other in lean.plan.alternatives)
    assert (lean.plan.provenance.search["objective"], lean.plan.excluded) == ("memory", ())
    assert lean.notes[-1].startswith("objective memory: the fullest GPU holds the least that any ")
    assert lean.limits == fast.limits  # what a plan may use is what it was


@pytest.mark.usefixtures("_toy")
def test_least_memory_that_is_too_much_or_not_known() -> None:
    question = replace(QUESTION, num_gpus=4, margin_ratio=0.997)
    with pytest.raises(Infeasible, match=r"^toy does not fit on 4 x h100-sxm\. Even in"):
        make_plan(question, PLAIN, Effort(objective=Objective.MEMORY))
    with pytest.raises(InputError) as refused:
        make_plan(QUESTION, SPACES["whole"], Effort(objective=Objective.MEMORY))
    assert str(refused.value) == (
        "--objective memory with --space whole: the least memory of stages of unequal size is not "
        "known. Try --space mist."
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize("objective", Objective)
def test_the_winner_is_the_best_of_single_runs(objective: Objective) -> None:
    found = told("2,16", "dgx-h100,dgx-a100", objective=objective, price="3,2", tokens=1e12)
    single = {}
    for cluster, price in (("dgx-h100", 3.0), ("dgx-a100", 2.0)):
        for num_gpus in (2, 16):
            asked = replace(QUESTION, cluster=cluster, num_gpus=num_gpus)
            planned = make_plan(asked, PLAIN, Effort(objective=objective, num_alternatives=2))
            tokens_per_s = planned.plan.estimate.tokens_per_s
            cost = {
                Objective.THROUGHPUT: 1 / tokens_per_s,
                Objective.NOMINAL: 1 / tokens_per_s,
                Objective.MEMORY: float(peak_of(planned)),
                Objective.TOKENS_PER_DOLLAR: num_gpus * price / tokens_per_s,
                Objective.TIME_TO_TOKENS: 1e12 / tokens_per_s,
            }[objective]
            single[cluster, num_gpus] = (cost, planned.plan)
    want = min(single, key=lambda key: (single[key][0], key[1]))
    best = found.candidates[found.index]
    assert (best.cluster, best.num_gpus) == want
    plan = single[want][1]
    assert found.planned.plan.stages == plan.stages
    assert found.planned.plan.estimate == plan.estimate
    assert [(one.cluster, one.num_gpus) for one in found.candidates] == [*single]
    for one in found.candidates:
        assert one.estimate == single[one.cluster, one.num_gpus][1].estimate


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_the_model_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer_with(toy_graph(), monkeypatch)
    told("2,4,8")
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_what_was_chosen_is_in_the_plan() -> None:
    found = told("2,4", price="2.5", tokens=1e12, objective=Objective.TOKENS_PER_DOLLAR)
    search = found.planned.plan.provenance.search
    assert search["objective"] == "tokens-per-dollar"
    assert search["candidates"] == "dgx-h100: 2, 4 GPUs"
    assert search["price_per_gpu_hour_usd"] == "dgx-h100: 2.5 (--price)"
    assert search["tokens"] == 1e12
    again = told("2,4", price="2.5", tokens=1e12, objective=Objective.TOKENS_PER_DOLLAR)
    assert dump_plan(again.planned.plan) == dump_plan(found.planned.plan)


@pytest.mark.usefixtures("_toy")
def test_a_price_of_a_profile_has_its_source() -> None:
    found = told("8", "aws-p5", objective=Objective.TOKENS_PER_DOLLAR)
    (one,) = found.candidates
    assert one.price_usd == 12.29
    assert one.price_source.startswith("guess: AWS, list price of p5.48xlarge on demand")
    assert "candidates" not in found.planned.plan.provenance.search


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_candidates_without_a_plan_say_why() -> None:
    found = told("2,12,16", gpu="l4", clusters="l4-box,gcp-l4-8")
    why = {(one.cluster, one.num_gpus): one.why for one in found.candidates}
    assert why["l4-box", 12] == (
        "--gpus 12: l4-box has 8 GPUs per node, so a job takes at most 8 GPUs or a multiple of 8. "
        "Try --gpus 8 or 16."
    )
    assert why["l4-box", 2] == why["gcp-l4-8", 16] == ""


@pytest.mark.slow
def test_nothing_fits_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph((8,), hidden=16384), monkeypatch)
    with pytest.raises(Infeasible) as refused:
        told("1,2", gpu="l4")
    lines = str(refused.value).splitlines()
    assert lines[0] == "None of the 2 candidates has a plan:"
    assert [line.partition(":")[0] for line in lines[1:3]] == ["  1 x l4-box", "  2 x l4-box"]
    assert all("Even in the layout of least memory" in line for line in lines[1:3])
    assert lines[3:] == ["No doubling of the GPUs up to 4096 fits."]  # with 16 samples


REFUSED = [
    ({"gpus": "many"}, "--gpus many: expected a number (16), a list (8,16,24) or a range (8..64)."),
    ({"gpus": "8.."}, "--gpus 8..: expected a number (16), a list (8,16,24) or a range (8..64)."),
    ({"gpus": "64..8"}, "--gpus 64..8: 64 is more than 8. Try --gpus 8..64."),
    ({"gpus": "0..8"}, "--gpus 0..8: a plan needs at least one GPU. Try --gpus 1..8."),
    (
        {"gpus": "9..15"},
        "--gpus 9..15: dgx-h100 (GPUs per node: 8) has no power of two and no multiple of a node "
        "in that range. Try --gpus 9,15.",
    ),
    (
        {"clusters": "dgx-h100,dgx-h10"},
        "--cluster dgx-h10: no cluster of that name. Did you mean dgx-h100 or dgx-h200 or "
        f"hgx-h20? {other_one('cluster')}",
    ),
    ({"clusters": "dgx-h100,dgx-h100"}, "--cluster dgx-h100,dgx-h100: a cluster is named twice."),
    (
        {"objective": Objective.TOKENS_PER_DOLLAR},
        "--objective tokens-per-dollar: no price for dgx-h100. Give --price USD per GPU hour, or "
        "set price_per_gpu_hour_usd: {value, source, kind} in the cluster's YAML.",
    ),
    (
        {"objective": Objective.TIME_TO_TOKENS},
        "--objective time-to-tokens: how many tokens? Try --tokens 2e12.",
    ),
    ({"tokens": 0.0}, "--tokens 0 is no number of tokens from 1 to 1e+18. Try --tokens 2e12."),
    (
        {"tokens": math.nan},
        "--tokens nan is no number of tokens from 1 to 1e+18. Try --tokens 2e12.",
    ),
    ({"price": "0"}, "--price 0 is no number of USD per GPU hour from 1e-06 to 1e+06."),
    (
        {"price": "cheap"},
        "--price cheap: expected USD per GPU hour (2.5), or one for each cluster (2.5,4).",
    ),
    (
        {"price": "1,2"},
        "--price 1.0,2.0: 2 prices for 1 clusters. Give one for all, or one for each.",
    ),
]


@pytest.mark.parametrize(("said", "message"), REFUSED)
def test_offers_that_are_refused(said: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        told(**said)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("gpus", "cluster", "numbers"),
    [
        ("16", "dgx-h100", (16,)),
        ("24,8,16,8", "dgx-h100", (8, 16, 24)),
        ("8..64", "dgx-h100", (8, 16, 24, 32, 40, 48, 56, 64)),
        ("1..8", "dgx-h100", (1, 2, 4, 8)),
        ("3..20", "dgx-h100", (4, 8, 16)),
        # 128 multiples of 8; those of 64 nodes' worth, 16 of 64, are too many: those of 128.
        ("8..1024", "dgx-h100", (8, 16, 32, 64, 128, 256, 384, 512, 640, 768, 896, 1024)),
        ("4..64", "one-gpu", (4, 8, 16, 24, 32, 40, 48, 56, 64)),
        ("4..64", "local-cpu", (4, 8)),  # one machine
    ],
)
def test_numbers_of_gpus(gpus: str, cluster: str, numbers: tuple[int, ...]) -> None:
    assert counts_of(gpus).of(load_cluster(cluster).profile) == numbers


def candidate(num_gpus: int, step_s: float | None, price_usd: float | None = 2.0) -> Candidate:
    """32 samples of 2048 tokens a step, on one stage of 48 GiB."""
    made: Estimate | None = None
    if step_s is not None:
        made = estimate_of(stage_estimate(peak_gib=48), step_s=step_s)
    return Candidate(
        num_gpus=num_gpus,
        cluster="dgx-h100",
        device="h100-sxm",
        price_usd=price_usd,
        price_source="--price",
        estimate=made,
        why="" if made else "too large",
    )


def test_prices_by_hand() -> None:
    # 65,536 tokens in 4 s are 16,384 tokens/s. 8 GPUs of 2 USD an hour are 16 USD an hour, in which
    # 58,982,400 tokens pass: 0.271 267 USD per million. 1e12 tokens take 61,035,156.25 s.
    one = candidate(8, 4.0)
    assert one.tokens_per_s == 16384
    assert one.usd_per_hour == 16
    assert one.usd_per_million_tokens == pytest.approx(16 / 58.9824, rel=1e-12)
    assert one.seconds_for(1e12) == 61_035_156.25
    assert one.usd_for(1e12) == pytest.approx(61_035_156.25 / 3600 * 16, rel=1e-12)
    free = candidate(8, 4.0, price_usd=None)
    assert (free.usd_per_hour, free.usd_for(1e12)) == (None, None)
    none = candidate(8, None)
    assert (none.seconds_for(1.0), none.usd_for(1.0), none.peak_bytes) == (None, None, math.inf)


def test_scaling_is_against_the_smallest_that_fits() -> None:
    rows = [candidate(4, None), candidate(8, 4.0), candidate(16, 2.5)]
    assert rows[1].scaling_ratio(rows) == 1.0
    assert rows[2].scaling_ratio(rows) == pytest.approx(0.8)  # 1.6 times the speed of half as many


def test_of_equals_the_smallest_is_chosen() -> None:
    rows = [candidate(16, 2.0), candidate(8, 4.0), candidate(4, None)]
    assert chosen(rows, Objective.TOKENS_PER_DOLLAR) == 1
    assert chosen(rows, Objective.MEMORY) == 1
    assert chosen(rows, Objective.THROUGHPUT) == chosen(rows, Objective.TIME_TO_TOKENS) == 0
