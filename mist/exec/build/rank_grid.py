"""Which rank does what, and which part of an activation goes from which rank to which. Torch-free.

A stage with dp d and tp t has ranks first + i * t + j: data-parallel index i, tensor-parallel
index j. A micro-batch is [samples, tokens]; rank (i, j) holds the rows of i, and under sequence
parallelism the columns of j, else all columns (t copies). Between stages of any two grids each rank
pulls what it needs, from the copy with the index nearest to its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mist.plans.plan import Plan, StagePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows [first, last) and columns [left, right) of a micro-batch."""

    first: int
    last: int
    left: int
    right: int

    def overlap(self, other: "Span") -> "Span | None":
        """The intersection of two spans, None if it is empty."""
        both = Span(
            first=max(self.first, other.first),
            last=min(self.last, other.last),
            left=max(self.left, other.left),
            right=min(self.right, other.right),
        )
        return both if both.first < both.last and both.left < both.right else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """The ranks of one stage, and the part of an activation between layers that each has.

    `dp_replicate`: copies of the states; the ranks of one are neighbours.
    """

    first_rank: int
    dp: int
    dp_replicate: int
    tp: int
    sequence_parallel: bool
    rows: int
    columns: int

    def rank(self, i: int, j: int) -> int:
        """The rank at data-parallel index i and tensor-parallel index j."""
        return self.first_rank + i * self.tp + j

    def holds(self, i: int, j: int) -> Span:
        """The part of an activation on the rank (i, j)."""
        rows, columns = self.rows // self.dp, self.columns
        part = columns // self.tp if self.sequence_parallel else columns
        left = j * part if self.sequence_parallel else 0
        return Span(first=i * rows, last=(i + 1) * rows, left=left, right=left + part)

    def places(self) -> Iterator[tuple[int, int]]:
        """All (i, j), in the order of the ranks."""
        return ((i, j) for i in range(self.dp) for j in range(self.tp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A part of a micro-batch that goes from one rank to another."""

    source: int
    target: int
    span: Span


def transfers(source: RankGrid, target: RankGrid) -> tuple[Transfer, ...]:
    """All that moves when an activation goes from one grid to another, in a fixed order."""
    return tuple(
        Transfer(source=source.rank(i, k), target=target.rank(*place), span=part)
        for place in target.places()
        for i in range(source.dp)
        for k in _copies(source, target, place[1])
        if (part := source.holds(i, k).overlap(target.holds(*place))) is not None
    )


def _copies(source: RankGrid, target: RankGrid, j: int) -> range:
    """Tensor-parallel indices to pull from: all shards, or one of the equal copies."""
    if source.sequence_parallel:
        return range(source.tp)
    # Spread over the copies, so that no rank of the source sends to all.
    one = j * source.tp // target.tp if source.tp > target.tp else j % source.tp
    return range(one, one + 1)


def grid_of(plan: Plan, stage: StagePlan) -> RankGrid:
    """The grid of a stage."""
    return RankGrid(
        first_rank=stage.devices[0],
        dp=stage.dp,
        dp_replicate=stage.dp_replicate,
        tp=stage.tp,
        sequence_parallel=stage.sp,
        rows=stage.dp * stage.micro_batch,
        columns=plan.workload.seq_len,
    )


def stage_of(plan: Plan, rank: int) -> int:
    """The number of the stage that a rank is in."""
    return next(i for i, s in enumerate(plan.stages) if rank < s.devices[0] + s.devices[1])


def uniform(plan: Plan) -> bool:
    """Whether every stage has the same dp and tp, so that ranks of stages pair up one to one."""
    return len({(stage.dp, stage.tp) for stage in plan.stages}) == 1


def chunk_layers(plan: Plan, stage: int) -> tuple[tuple[int, range], ...]:
    """For each chunk of a stage: its place in the pipeline and its layers."""
    return tuple(
        (chunk * len(plan.stages) + stage, range(first, first + count))
        for chunk, (first, count) in enumerate(plan.stages[stage].layers)
    )
