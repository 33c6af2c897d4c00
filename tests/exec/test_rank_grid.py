"""Between any two grids every rank gets exactly what it holds, each part once."""

from hypothesis import given
from hypothesis import strategies as st

from mist.exec.build.rank_grid import RankGrid, Span, transfers

sizes = st.sampled_from([1, 2, 4])


def grids(first_rank: int) -> st.SearchStrategy[RankGrid]:
    return st.builds(
        RankGrid,
        first_rank=st.just(first_rank),
        dp=sizes,
        dp_replicate=st.just(1),
        tp=sizes,
        sequence_parallel=st.booleans(),
        rows=st.just(4),
        columns=st.just(8),
    )


def cells(span: Span) -> set[tuple[int, int]]:
    rows, columns = range(span.first, span.last), range(span.left, span.right)
    return {(row, column) for row in rows for column in columns}


@given(source=grids(0), target=grids(100))
def test_every_part_arrives_once_from_a_rank_that_holds_it(
    source: RankGrid, target: RankGrid
) -> None:
    held = {source.rank(*place): cells(source.holds(*place)) for place in source.places()}
    for place in target.places():
        mine = [t for t in transfers(source, target) if t.target == target.rank(*place)]
        parts = [cells(each.span) for each in mine]
        assert set().union(*parts) == cells(target.holds(*place))
        assert sum(map(len, parts)) == len(cells(target.holds(*place)))
        assert all(cells(each.span) <= held[each.source] for each in mine)


@given(grid=grids(0))
def test_equal_grids_pair_up(grid: RankGrid) -> None:
    found = transfers(grid, grid)
    assert [(each.source, each.target) for each in found] == [
        (grid.rank(*place), grid.rank(*place)) for place in grid.places()
    ]
