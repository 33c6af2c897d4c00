"""Rows that stand for all tuples of offload ratios, against the formulas of every tuple."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mist.pareto.bounds import lower_bound_s
from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import capacity
from mist.pareto.layer_ranges import layer_ranges
from mist.pareto.linear_cost import instants
from mist.pareto.offload_ratios import MostOffloaded, offloading
from mist.pareto.strategies import Group, Strategies, groups
from mist.plans.plan import Limits
from mist.plans.search_space import NO_RATIOS, OFFLOADED, SearchSpace
from mist.symbolic.columns import position_columns
from mist.symbolic.job import Job
from tests.fast_cases import first_fast
from tests.toys import count_columns, toy_graph, toy_job

TIMES = ("stable_s", "lone_s")
MODELS = [((6,), 64), ((2, 4), 1024)]  # all of a stream in one bucket, and many buckets


def outputs(
    job: Job, group: Group, own: Strategies, stage: int, mix: tuple[int, ...]
) -> dict[str, NDArray[np.float64]]:
    """What the formulas say of stages with these layers at each level, by strategy [K]."""
    size = group.sizes[0]
    devices = np.array([(i * size, size) for i in range(group.num_stages)])
    position = position_columns(
        job.placement, devices, sum(mix), group.num_micro_batches, group.schedule
    )
    columns = {name: np.asarray(column)[stage] for name, column in position.items()}
    first = 0 if stage == 0 else job.num_layers - sum(mix)
    levels = count_columns(job, first, [np.array(count) for count in mix])
    return job.cost.search({**own.terms, **columns, **levels})


def rows_of(most: Strategies, own: Strategies) -> NDArray[np.int64]:
    """For each strategy the row that stands for it: the same knobs and share of activations."""
    names = [*own.knobs, "activations"]
    keys, wanted = (np.stack([each[name] for name in names], -1) for each in (most, own))
    same = (wanted[:, None] == keys).all(axis=-1)
    assert (same.sum(axis=1) == 1).all()
    return same.argmax(axis=1)


@pytest.mark.parametrize("runtime", first_fast(["torch", "deepspeed-zero3", "mist-fp16"], 2))
@pytest.mark.parametrize(("counts", "hidden"), MODELS)
def test_no_tuple_of_ratios_beats_the_row_that_stands_for_it(
    counts: tuple[int, ...], hidden: int, runtime: str
) -> None:
    job = toy_job(toy_graph(counts, hidden), 4, runtime=runtime, global_batch=16)
    space, rng = SearchSpace(chunks=(1, 2)), np.random.default_rng(hidden)
    rows, num_levels, num_compared = MostOffloaded(job, space, ()), len(job.levels), 0
    listed = list(groups(job, space))
    for group in listed[:: max(1, len(listed) // 10)]:
        most = rows.of(group)
        away = offloading(job, group, space, np.arange(len(group.strategies)))
        own = group.strategies.joined(away)
        own = own.take(rng.permutation(len(own))[:200])
        stands = most.take(rows_of(most, own))
        for stage in {0, group.num_stages // 2, group.num_stages - 1}:
            count = int(rng.integers(group.schedule.vpp, 7))
            mix = tuple(rng.multinomial(count, [1 / num_levels] * num_levels).tolist())
            found, bound = (outputs(job, group, each, stage, mix) for each in (own, stands))
            for name in (*TIMES, *instants(job.platform.runtime)):
                # Sums of other numbers are rounded otherwise.
                assert (bound[name] <= found[name] * (1 + 1e-12)).all(), (name, group, stage, mix)
                num_compared += len(own)
    assert num_compared > 200


def test_the_rows_are_reached_by_what_keeps_all_and_by_what_offloads_all() -> None:
    """Times of what has its states on the device, bytes but for the stream of what has none."""
    job, space = toy_job(toy_graph((6,)), 4, global_batch=16), SearchSpace()
    group = next(each for each in groups(job, space) if each.num_stages == 2)
    most = MostOffloaded(job, space, ()).of(group)
    away = offloading(job, group, space, np.arange(len(group.strategies)))
    own = group.strategies.joined(away)
    stands = rows_of(most, own)
    resident = np.all([own[name] == 0 for name in OFFLOADED[:3]], axis=0)
    found, bound = (outputs(job, group, each, 1, (1, 0, 2)) for each in (own, most.take(stands)))
    for name in TIMES:
        assert (found[name][resident] == bound[name][resident]).all()
    for row in range(len(most)):
        least = found["begin_bytes"][stands == row].min()
        assert least == pytest.approx(bound["begin_bytes"][stands == row][0], rel=1e-12)


def test_groups_with_as_many_stages_are_priced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(toy_graph((8,)), 4, global_batch=16)
    space = SearchSpace(pp=(2,), tp=(1,))
    listed = list(groups(job, space))
    known = MostOffloaded(job, space, listed)
    alone = [MostOffloaded(job, space, ()).of(group) for group in listed]
    num_priced = 0
    priced = Strategies.priced

    def counted(*args: object) -> Strategies:
        nonlocal num_priced
        num_priced += 1
        return priced(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Strategies, "priced", counted)
    for group, want in zip(listed, alone, strict=True):
        found = known.of(group)
        assert all((found.terms[name] == term).all() for name, term in want.terms.items())
    assert num_priced == 1 < len(listed) <= 32


def test_where_nothing_may_be_offloaded_strategies_stand_for_themselves() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    space = SearchSpace(offload=NO_RATIOS)
    group = next(iter(groups(job, space)))
    assert MostOffloaded(job, space, ()).of(group) is group.strategies


def keys_of(own: Strategies) -> set[bytes]:
    """Each strategy by its knobs and ratios."""
    columns = np.stack([column.astype(np.float64) for column in own.columns.values()], -1)
    return {row.tobytes() for row in columns}


def test_what_the_rows_rule_out_no_tuple_can_do() -> None:
    """The groups that they rule out are among those of the bound that knows every tuple.

    In the others, so are the tuples of the rows that they rule out.
    """
    job, space = toy_job(toy_graph((6,)), 4, global_batch=16), SearchSpace()
    rows, num_out, num_open, num_tuples_out = MostOffloaded(job, space, ()), 0, 0, 0
    for group in list(groups(job, space))[::4]:
        all_rows = np.arange(len(group.strategies))
        away = offloading(job, group, space, all_rows)
        every = GroupModel(job, group, group.strategies.joined(away), space)
        few = GroupModel(job, group, rows.of(group), space)
        ranges = layer_ranges(job, group.num_stages, least=group.schedule.vpp)
        for device_bytes in (0.6e9, 1e9, 2e9):
            limits = Limits(device_bytes=device_bytes, host_bytes=64e9)
            for slack in (1.05, 1.3, 3.0):
                step_s = slack * lower_bound_s(job, group, space.levels)
                may, can = (capacity(m, ranges, limits, step_s, coarse=True) for m in (few, every))
                assert may.suffices or not can.suffices
                num_out += not may.suffices
                num_open += can.suffices
                if can.suffices:
                    left = offloading(job, group, space, all_rows, few.strategies.take(may.useful))
                    tuples_out = keys_of(away) - keys_of(left)
                    assert not tuples_out & keys_of(every.strategies.take(can.useful))
                    num_tuples_out += len(tuples_out)
    assert num_out > 10
    assert num_open > 10
    assert num_tuples_out > 1000
