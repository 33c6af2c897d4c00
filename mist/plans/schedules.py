"""Time of one training step of a pipeline, from three numbers per stage.

    T = (G - 1) * max_i t_i  +  max_i ( u_i + sum_{j>i} f_j )

(`step_time`). i = 0..S-1 counts stages from the first, t_i is the stage's stable time, d_i its
delta and u_i = t_i + d_i the time of a lone micro-batch. f_j is what stage j adds to filling and
draining (`fill_time`, with 2 w_j from `spare_time`):

    f_j = t_j                1F1B and GPipe
    f_j = t_j / v            v interleaved chunks (Narayanan et al. 2021, section 2.2)
    f_j = (t_j - 2 w_j) / v  zero bubble: w_j, the part of t_j that computes gradients of weights,
                             leaves the way of the gradients, and fills a bubble as long as itself
                             (ZB-H1 waits F + B - W where 1F1B waits F + B + W: Qi et al. 2024)

With f = t Mist (EuroSys'25, section 5) writes the same T as

    T = (G - 1) * max_i t_i  +  sum_i t_i  +  max_i ( d_i - sum_{j<i} t_j )

because sum_i t_i - sum_{j<i} t_j = t_i + sum_{j>i} t_j. The form in (t, u) is monotone in both,
so a point that is worse in t and in u is never needed: frontiers are kept in (t, u), not (t, d).
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.plans.workload import ScheduleKind

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRow:
    """What a schedule is.

    Args:
        forwards: chunks that go forward on a rank before the first one goes back, plus one. From
            chunks of the turns before the last, stages behind the rank, stages, chunks of a step.
        least_chunks: that a stage has at least.
        takes_turns: chunks run in turn, or the backward pass is split: ranks of stages are
            connected one to one (torch.distributed.pipelining), so stages have the same dp and tp.
        splits_backward: gradients of weights are computed later than those of activations.
        holds_all: all micro-batches go forward before any goes back.
    """

    forwards: Callable[[Counts, Counts, Counts, Counts], Counts]
    least_chunks: int = 1
    takes_turns: bool = False
    splits_backward: bool = False
    holds_all: bool = False


SCHEDULES: Final = MappingProxyType(
    {
        # "0 * behind" gives a number that is the same for all stages their shape.
        ScheduleKind.GPIPE: ScheduleRow(
            forwards=lambda turns, behind, stages, step: step + 0 * behind, holds_all=True
        ),
        ScheduleKind.ONE_F_ONE_B: ScheduleRow(
            forwards=lambda turns, behind, stages, step: behind + 1
        ),
        ScheduleKind.INTERLEAVED: ScheduleRow(
            forwards=lambda turns, behind, stages, step: turns + 2 * behind + 1,
            least_chunks=2,
            takes_turns=True,
        ),
        ScheduleKind.ZERO_BUBBLE: ScheduleRow(
            forwards=lambda turns, behind, stages, step: turns + stages + 0 * behind,
            takes_turns=True,
            splits_backward=True,
        ),
    }
)
"""What is known of each schedule; the class that runs it is in `mist.exec.build.pipeline`."""

DEFAULT_KIND: Final = ScheduleKind.ONE_F_ONE_B


def kind_of(chunks: int) -> ScheduleKind:
    """The schedule of a framework that says only how many chunks a stage has."""
    return DEFAULT_KIND if chunks == 1 else ScheduleKind.INTERLEAVED


def kinds_that(has: Callable[[ScheduleRow], bool]) -> tuple[str, ...]:
    """The schedules with a property, as values of a column."""
    return tuple(kind.value for kind, row in SCHEDULES.items() if has(row))


def step_time(
    num_micro_batches: int | NDArray[np.int64],
    stable_s: NDArray[np.float64],
    lone_s: NDArray[np.float64],
    fill_s: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Seconds of one step, for one pipeline or for many at once.

        T = (G - 1) * max_i stable_i + max_i ( lone_i + sum_{j>i} fill_j )

    `stable_s`, `lone_s`: seconds, shape [..., S], first stage first. `fill_s`: seconds that each
    stage adds to filling and draining, same shape; None: `stable_s`, as in 1F1B and GPipe.
    `num_micro_batches`: G, an integer or an array of shape [...]. Returns seconds, shape [...]; for
    one pipeline an array without dimensions, which `float()` takes.
    """
    fill_s = stable_s if fill_s is None else fill_s
    # Cumulative from the last stage; without its own part each sum is that of the stages behind.
    up_to_s = np.cumsum(fill_s[..., ::-1], axis=-1)[..., ::-1]
    lone_exit_s = np.max(lone_s + (up_to_s - fill_s), axis=-1)
    bottleneck_s = np.max(stable_s, axis=-1)
    return np.asarray((num_micro_batches - 1) * bottleneck_s + lone_exit_s, dtype=np.float64)


def spare_time(kind: ScheduleKind, weight_s: ArrayLike) -> NDArray[np.float64]:
    """Seconds of a stable time that keep no other stage waiting; same shape as `weight_s`.

    2 w under zero bubble, else 0: gradients of weights wait, and those of another micro-batch run
    where 1F1B has a bubble (ZB-H1, Qi et al. 2024). `weight_s`: seconds of a micro-batch that
    compute gradients of weights.
    """
    return np.asarray((2.0 if SCHEDULES[kind].splits_backward else 0.0) * np.asarray(weight_s))


def fill_time(
    stable_s: ArrayLike, spare_s: ArrayLike = 0.0, *, chunks: ArrayLike = 1
) -> NDArray[np.float64]:
    """Seconds that each stage adds to filling and draining the pipeline: f = (t - spare) / v.

    `stable_s`, `spare_s` (see `spare_time`) and `chunks` (v: a chunk is 1/v of a stage) are numbers
    or arrays that broadcast; the result has their shape.
    """
    return np.asarray(np.maximum(np.asarray(stable_s) - np.asarray(spare_s), 0.0) / chunks)


def in_flight(
    kind: ScheduleKind,
    *,
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_micro_batches: ArrayLike,
    chunks: ArrayLike,
) -> NDArray[np.float64]:
    """Micro-batches whose activations a stage holds at once, in whole stages (a chunk is 1/v).

    Forward runs of a chunk before the first backward one, plus one, as torch's schedules count them
    (torch/distributed/pipelining/schedules.py; the interleaved one as Megatron-LM's). Under zero
    bubble a weight gradient lags by as many micro-batches as there are stages before: every stage
    holds S. Arguments are numbers or arrays that broadcast.
    """
    micro, v = np.asarray(num_micro_batches), np.asarray(chunks)
    most = chunks_held(kind, np.asarray(stage), np.asarray(num_stages), micro, v)
    return np.asarray(np.minimum(most / v, micro), dtype=np.float64)


def chunks_held(
    kind: ScheduleKind, stage: Counts, num_stages: Counts, num_micro_batches: Counts, v: Counts
) -> Counts:
    """What `in_flight` counts, in chunks, in a step of many micro-batches."""
    behind = num_stages - 1 - stage
    turns = (v - 1) * round_size(num_stages, num_micro_batches)
    return SCHEDULES[kind].forwards(turns, behind, num_stages, num_micro_batches * v)


def round_size(num_stages: Counts, num_micro_batches: Counts) -> Counts:
    """Micro-batches that a chunk runs before the next one has its turn."""
    return np.asarray(num_micro_batches // np.maximum(num_micro_batches // num_stages, 1))


def held(  # noqa: PLR0913 - a pipeline and its layers
    kind: ScheduleKind,
    *,
    layers: ArrayLike,
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_micro_batches: ArrayLike,
    chunks: ArrayLike,
) -> dict[str, NDArray[np.float64]]:
    """What a stage holds at once, in micro-batches, as a backward pass begins: columns by name.

    `in_flight` of its chunks, on the average; `layers_more` of its layers; `embed_more` of the
    embedding, on the first stage; `head_held` of the head, whose forward pass its own backward pass
    follows at once (but for GPipe); `waiting`: those of them whose gradients of weights are still
    to come, one for each stage before under zero bubble (`splits` 1, else 0); `one_round`: whether
    several chunks run one round, so that a stage holds most as the first of them goes backward;
    `forward_first`: see there. `layers`: of the stage. Arguments are numbers or arrays that
    broadcast.
    """
    stages, micro, v = map(np.asarray, (num_stages, num_micro_batches, chunks))
    sizes = {"num_stages": stages, "num_micro_batches": micro, "chunks": v}
    average = in_flight(kind, stage=stage, **sizes)
    more = layers_more(kind, layers=np.asarray(layers)[..., None], stage=stage, **sizes)[..., 0]
    each_round = round_size(stages, micro)
    embed = np.where(v > 1, np.minimum(2 * each_round, micro), average)
    holds_all, splits = SCHEDULES[kind].holds_all, SCHEDULES[kind].splits_backward
    columns = {
        "in_flight": average,
        "layers_more": more,
        "embed_more": (embed - average) * (np.asarray(stage) == 0),
        "head_held": micro if holds_all else 1,
        "splits": int(splits),
        "waiting": splits * np.asarray(stage) / v,
        "one_round": (v > 1) & (micro < 2 * stages),
        "forward_first": forward_first(average, micro),
    }
    return {name: np.asarray(column + 0.0 * average) for name, column in columns.items()}


def layers_more(  # noqa: PLR0913 - a pipeline and its layers
    kind: ScheduleKind,
    *,
    layers: ArrayLike,
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_micro_batches: ArrayLike,
    chunks: ArrayLike,
) -> NDArray[np.float64]:
    """Micro-batches that an average layer of a stage is in flight for beyond `in_flight`.

    Of n layers the first k = n mod v chunks of a stage have one more, and wait longest:

        more = ( max_j sum_{c < k} m_c(j) - k in_flight ) / n

    where chunk c holds m_c(j) micro-batches as the j-th backward pass of the rank begins. A round
    later they are the same again, or less once nothing runs forward. `layers` [..., N]; the others
    [...], numbers or arrays that broadcast. Returns [..., N].
    """
    sizes = {"num_stages": num_stages, "num_micro_batches": num_micro_batches, "chunks": chunks}
    average = in_flight(kind, stage=stage, **sizes)[..., None]
    count, v = np.asarray(layers), np.asarray(chunks)[..., None]
    if not SCHEDULES[kind].takes_turns or np.max(chunks) == 1:
        return np.asarray(0.0 * (average + count))
    larger = count % v
    most = _first_chunks_held(kind, stage, **sizes)
    shape = np.broadcast_shapes(most.shape[:-1], larger.shape[:-1])
    most = np.broadcast_to(most, (*shape, most.shape[-1]))
    larger = np.broadcast_to(larger, (*shape, larger.shape[-1]))
    held_more = np.take_along_axis(most, larger, axis=-1) - larger * average
    return np.asarray(held_more / np.maximum(count, 1))


def _first_chunks_held(
    kind: ScheduleKind,
    stage: ArrayLike,
    *,
    num_stages: ArrayLike,
    num_micro_batches: ArrayLike,
    chunks: ArrayLike,
) -> Counts:
    """The most that the first k chunks of a stage hold at once, k = 0..v - 1: [..., max v]."""
    numbers = (stage, num_stages, num_micro_batches, chunks)
    place, stages, micro, v = (np.asarray(number)[..., None, None] for number in numbers)
    each_round = round_size(stages, micro)
    chunk, backward = np.arange(np.max(v)), np.arange(np.max(each_round * v))[:, None]

    def run(passes: Counts, turn: Counts) -> Counts:
        """Micro-batches of a chunk among so many passes; it has its turn behind so many others."""
        rounds, within = np.divmod(passes, each_round * v)
        own = np.clip(within - turn * each_round, 0, each_round)
        return np.asarray(rounds * each_round + own)

    ahead = chunks_held(kind, place, stages, micro, v)
    # Backward passes begin with the last chunk, so its turns count from the other end.
    held = run(np.minimum(ahead + backward, micro * v), chunk) - run(backward, v - 1 - chunk)
    together = np.cumsum(np.where(chunk < v, held, 0), axis=-1)[..., :-1].max(axis=-2)
    return np.concatenate([np.zeros_like(together[..., :1]), together], axis=-1)


def zero_as_run(kind: ScheduleKind, zero: ArrayLike) -> NDArray[np.int64]:
    """The ZeRO level by which a stage reduces gradients: a split backward pass does so once a step.

    FSDP2 knows no gradients of weights when it would reduce them, so that ZeRO-2 runs as ZeRO-1.
    """
    levels = np.asarray(zero)
    return np.where(levels == 2, 1, levels) if SCHEDULES[kind].splits_backward else levels


def forward_first(held: ArrayLike, num_micro_batches: ArrayLike) -> NDArray[np.bool_]:
    """Whether a stage that holds so many micro-batches runs all of a step forward before any back.

    Arguments are numbers or arrays that broadcast.
    """
    return np.asarray(held) >= np.asarray(num_micro_batches)
