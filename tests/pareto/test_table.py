"""What a table says of every stage, against each stage tried by itself."""

import numpy as np
import pytest

from mist.estimate import Job, count_columns, position_columns, strategy_columns
from mist.pareto.space import Group, divisors, groups
from mist.pareto.table import StageTable, stage_table
from mist.spec import SearchSpace
from tests.toys import toy_graph, toy_job

ALIKE, UNLIKE = (5,), (2, 3)


def stage_alone(job: Job, group: Group, k: int, i: int, run: tuple[int, int], full: int) -> dict:
    """One stage of the group, evaluated with every part."""
    strategy = strategy_columns(
        job,
        num_stages=group.num_stages,
        dp=group.dp[k],
        tp=group.tp[k],
        micro_batch=group.micro_batch[k],
        zero=group.zero[k],
    )
    size = group.num_devices
    devices = np.array([(i * size, size) for i in range(group.num_stages)])
    position = position_columns(job, devices, group.num_micro_batches)
    columns = {name: np.asarray(column)[i] for name, column in position.items()}
    levels = count_columns(job, run[0], (run[1] - full, 0, full))
    return job.cost.stage({**job.cost.terms(strategy), **columns, **levels})


def tables(job: Job, space: SearchSpace, limit: float) -> list[StageTable]:
    return [stage_table(job, group, space, limit) for group in groups(job, space)]


@pytest.mark.parametrize("counts", [ALIKE, UNLIKE])
@pytest.mark.parametrize("limit", [0.9e9, 1.2e9, 2.0e9, 8e9])
def test_fewest_recomputed_layers_that_fit(counts: tuple[int, ...], limit: float) -> None:
    job = toy_job(toy_graph(counts), 4, global_batch=16)
    checked = 0
    for table in tables(job, SearchSpace(pp=(1, 2), zero=(0, 3)), limit)[::3]:
        for k, i, r in np.ndindex(table.stable_s.shape):
            if not np.isfinite(table.peak_bytes[k, i, r]):
                continue
            run = (int(table.first[r]), int(table.count[r]))
            peaks = [
                float(stage_alone(job, table.group, k, i, run, full)["peak_bytes"])
                for full in range(run[1] + 1)
            ]
            fitting = [full for full, peak in enumerate(peaks) if peak <= limit]
            assert table.feasible[k, i, r] == bool(fitting)
            if fitting:
                assert table.num_full[k, i, r] == fitting[0]
                assert table.peak_bytes[k, i, r] == pytest.approx(peaks[fitting[0]])
            checked += 1
    assert checked >= 32


@pytest.mark.parametrize(("checkpoint", "share"), [("none", 0), ("full", 1)])
def test_checkpoint_restriction(checkpoint: str, share: int) -> None:
    job = toy_job(toy_graph(ALIKE), 4, global_batch=16)
    for table in tables(job, SearchSpace(checkpoint=checkpoint), 1.2e9):
        assert (table.num_full == share * table.count).all()


def test_ranges_of_unlike_layers_leave_enough_for_the_others() -> None:
    job = toy_job(toy_graph(UNLIKE), 4, global_batch=16)
    (table, *_) = tables(job, SearchSpace(pp=(4,)), 80e9)
    for i in range(4):
        placed = np.isfinite(table.peak_bytes[0, i])
        got = {
            (int(f), int(c)) for f, c in zip(table.first[placed], table.count[placed], strict=True)
        }
        want = {
            (f, c)
            for f in range(5)
            for c in range(1, 6 - f)
            if (f == 0 if i == 0 else f >= i) and (f + c == 5 if i == 3 else 5 - f - c >= 3 - i)
        }
        assert got == want


def test_groups_hold_every_legal_strategy_and_no_other() -> None:
    job = toy_job(toy_graph(ALIKE), 8, global_batch=24)
    got = {
        (g.num_stages, g.num_micro_batches, int(tp), int(dp), int(b), int(z))
        for g in groups(job, SearchSpace())
        for tp, dp, b, z in zip(g.tp, g.dp, g.micro_batch, g.zero, strict=True)
    }
    want = {
        (pp, g, tp, 8 // pp // tp, 24 // g // (8 // pp // tp), z)
        for pp in (1, 2, 4)
        for g in divisors(24)
        for tp in divisors(8 // pp)
        for z in range(4)
        if 24 % (g * (8 // pp // tp)) == 0
        and g >= pp
        and 4096 % tp == 0
        and (z == 0 or 8 // pp // tp > 1)
    }
    assert got == want


def test_restrictions_are_kept() -> None:
    job = toy_job(toy_graph(ALIKE), 8, global_batch=32)
    space = SearchSpace(tp=(2,), pp=(1, 2), dp=(2, 4), micro_batch=(2,), zero=(1, 2))
    found = list(groups(job, space))
    assert found
    for group in found:
        assert group.num_stages in (1, 2)
        assert set(group.tp) == {2}
        assert set(group.dp) <= {2, 4}
        assert set(group.micro_batch) == {2}
        assert set(group.zero) <= {1, 2}
