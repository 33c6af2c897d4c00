"""Even splits against every composition of the layers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mist.pareto.space import groups
from mist.pareto.split import even_split
from mist.pareto.table import StageTable, stage_table
from mist.spec import SearchSpace
from tests.toys import toy_graph, toy_job


def compositions(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    counts = itertools.product(range(1, num_layers + 1), repeat=num_stages)
    return [c for c in counts if sum(c) == num_layers]


def rows_of(table: StageTable, counts: tuple[int, ...]) -> list[int]:
    """The table's range for every stage of a composition."""
    rows, first = [], 0
    for count in counts:
        at = table.count == count
        rows.append(int(np.flatnonzero(at if table.alike else at & (table.first == first))[0]))
        first += count
    return rows


@pytest.mark.parametrize("counts", [(6,), (2, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_even_split_is_the_best_of_all_compositions(counts: tuple[int, ...], seed: int) -> None:
    job = toy_job(toy_graph(counts), 4, global_batch=16)
    group = next(g for g in groups(job, SearchSpace(pp=(4,))))
    table = stage_table(job, group, SearchSpace(), 80e9)
    rng = np.random.default_rng(seed)
    value = rng.uniform(1, 2, table.stable_s.shape) * table.count
    value[rng.uniform(size=value.shape) < 0.25] = np.inf
    value = np.where(np.isfinite(table.peak_bytes), value, np.inf)
    chosen = even_split(table, value)
    for k in range(group.num_strategies):
        every = [
            max(value[k, i, row] for i, row in enumerate(rows_of(table, c)))
            for c in compositions(6, 4)
        ]
        if np.isinf(min(every)):
            assert (chosen[k] == -1).all()
            continue
        got = [value[k, i, row] for i, row in enumerate(chosen[k])]
        assert table.count[chosen[k]].sum() == 6
        assert max(got) == min(every)


def test_nothing_feasible_gives_no_row() -> None:
    job = toy_job(toy_graph((6,)), 4, global_batch=16)
    group = replace(next(iter(groups(job, SearchSpace(pp=(2,))))))
    table = stage_table(job, group, SearchSpace(), 80e9)
    assert (even_split(table, np.full(table.stable_s.shape, np.inf)) == -1).all()
