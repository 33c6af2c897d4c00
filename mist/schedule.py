"""Time of one training step of a pipeline, from three numbers per stage.

    T = (G - 1) * max_i t_i  +  max_i ( u_i + sum_{j>i} f_j )

i = 0..S-1 counts stages from the first, t_i is the stage's stable time, d_i its delta and
u_i = t_i + d_i the time of a lone micro-batch. f_j is what stage j adds to filling and draining:

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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.spec import ScheduleKind


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
    up_to_s = np.cumsum(fill_s[..., ::-1], axis=-1)[..., ::-1]
    lone_exit_s = np.max(lone_s + (up_to_s - fill_s), axis=-1)
    bottleneck_s = np.max(stable_s, axis=-1)
    return np.asarray((num_micro_batches - 1) * bottleneck_s + lone_exit_s, dtype=np.float64)


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
    stages, micro = np.asarray(num_stages), np.asarray(num_micro_batches)
    behind = stages - 1 - np.asarray(stage)
    each_round = micro // np.maximum(micro // stages, 1)
    turns = (np.asarray(chunks) - 1) * each_round
    chunks_held = {
        ScheduleKind.GPIPE: micro * np.asarray(chunks) + 0 * behind,
        ScheduleKind.ONE_F_ONE_B: behind + 1,
        ScheduleKind.INTERLEAVED: turns + 2 * behind + 1,
        ScheduleKind.ZERO_BUBBLE: turns + stages + 0 * behind,
    }[kind]
    return np.asarray(np.minimum(chunks_held / np.asarray(chunks), micro), dtype=np.float64)


def held(
    kind: ScheduleKind,
    *,
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_micro_batches: ArrayLike,
    chunks: ArrayLike,
) -> dict[str, NDArray[np.float64]]:
    """What a stage holds at once, in micro-batches, as a backward pass begins: columns by name.

    `in_flight` of its layers, on the average of its chunks; `embed_more` of the embedding, on the
    first stage; `head_held` of the head, whose forward pass its own backward pass follows at once
    (but for GPipe); `waiting`: those of them whose gradients of weights are still to come, one for
    each stage before under zero bubble (`splits` 1, else 0); `one_round`: whether several chunks
    run one round, so that a stage holds most as the first of them goes backward; `forward_first`:
    see there. Arguments are numbers or arrays that broadcast.
    """
    stages, micro, v = map(np.asarray, (num_stages, num_micro_batches, chunks))
    sizes = {"num_stages": stages, "num_micro_batches": micro, "chunks": v}
    layers = in_flight(kind, stage=stage, **sizes)
    each_round = micro // np.maximum(micro // stages, 1)
    embed = np.where(v > 1, np.minimum(2 * each_round, micro), layers)
    gpipe, splits = kind is ScheduleKind.GPIPE, kind is ScheduleKind.ZERO_BUBBLE
    columns = {
        "in_flight": layers,
        "embed_more": (embed - layers) * (np.asarray(stage) == 0),
        "head_held": micro if gpipe else 1,
        "splits": int(splits),
        "waiting": splits * np.asarray(stage) / v,
        "one_round": (v > 1) & (micro < 2 * stages),
        "forward_first": forward_first(layers, micro),
    }
    return {name: np.asarray(column + 0.0 * layers) for name, column in columns.items()}


def zero_as_run(kind: ScheduleKind, zero: ArrayLike) -> NDArray[np.int64]:
    """The ZeRO level by which a stage reduces gradients: a split backward pass does so once a step.

    FSDP2 knows no gradients of weights when it would reduce them, so that ZeRO-2 runs as ZeRO-1.
    """
    levels = np.asarray(zero)
    return np.where(levels == 2, 1, levels) if kind is ScheduleKind.ZERO_BUBBLE else levels


def forward_first(held: ArrayLike, num_micro_batches: ArrayLike) -> NDArray[np.bool_]:
    """Whether a stage that holds so many micro-batches runs all of a step forward before any back.

    Arguments are numbers or arrays that broadcast.
    """
    return np.asarray(held) >= np.asarray(num_micro_batches)
