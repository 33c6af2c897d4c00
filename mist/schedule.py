"""Time of one training step of a 1F1B pipeline, from two numbers per stage.

    T = (G - 1) * max_i t_i  +  max_i ( u_i + sum_{j>i} t_j )

i = 0..S-1 counts stages from the first, t_i is the stage's stable time, d_i its delta and
u_i = t_i + d_i the time of a lone micro-batch. Mist (EuroSys'25, section 5) writes the same T as

    T = (G - 1) * max_i t_i  +  sum_i t_i  +  max_i ( d_i - sum_{j<i} t_j )

because sum_i t_i - sum_{j<i} t_j = t_i + sum_{j>i} t_j. The form in (t, u) is monotone in both,
so a point that is worse in t and in u is never needed: frontiers are kept in (t, u), not (t, d).
"""

import numpy as np
from numpy.typing import NDArray


def step_time(
    num_micro_batches: int | NDArray[np.int64],
    stable_s: NDArray[np.float64],
    lone_s: NDArray[np.float64],
    chunks: int | NDArray[np.int64] = 1,
) -> NDArray[np.float64]:
    """Seconds of one step, for one pipeline or for many at once.

    `stable_s`, `lone_s`: seconds, shape [..., S], first stage first. `num_micro_batches`: G, an
    integer or an array of shape [...]. `chunks`: v pieces of a stage's layers that take turns;
    filling and draining then takes 1/v (Narayanan et al. 2021, section 2.2). Returns seconds, shape
    [...]; for one pipeline an array without dimensions, which `float()` takes.
    """
    up_to_s = np.cumsum(stable_s[..., ::-1], axis=-1)[..., ::-1]
    lone_exit_s = np.max(lone_s + (up_to_s - stable_s), axis=-1)
    bottleneck_s, alone_s = np.max(stable_s, axis=-1), np.max(lone_s, axis=-1)
    filled_s = alone_s + (lone_exit_s - alone_s) / chunks
    return np.asarray((num_micro_batches - 1) * bottleneck_s + filled_s, dtype=np.float64)
