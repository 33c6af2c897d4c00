"""Strategies that offload, a block at a time: what a bound rules out before it is priced.

A block is the strategies that differ only in how much of weights, gradients and optimizer they
offload. No time falls with one of these ratios, and no memory rises: so a stage of the block is
never faster than with none of them offloaded (its *eased* member), and never smaller than with as
much of each as any member has (its *lean* one). One row with the times of the first and the bytes
of the second stands for a hundred, and what it cannot take (`mist.pareto.capacity`) none of them
can. Activations are not among them: staged on their way they may take more than they save.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import capacity
from mist.pareto.layer_ranges import Ranges
from mist.pareto.strategies import Ints, Strategies, offload_tuples
from mist.plans.plan import Limits

_STATES = ("weights", "grads", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """B blocks of K strategies: `block` [K] of each, and an eased and a lean one of each block."""

    block: Ints
    eased: Strategies
    lean: Strategies


def blocks_of(strategies: Strategies) -> Blocks:
    """The blocks of strategies, which need not be priced."""
    columns = strategies.columns
    knobs = np.stack([columns[name] for name in columns if name not in _STATES], axis=-1)
    _, first, block = np.unique(knobs, axis=0, return_index=True, return_inverse=True)
    block, one = block.ravel(), strategies.take(first)
    most = {name: np.zeros(len(first)) for name in _STATES}
    for name, ratios in most.items():
        np.maximum.at(ratios, block, columns[name])
    none = dict.fromkeys(_STATES, np.zeros(len(first)))
    return Blocks(block=block, eased=replace(one, **none), lean=replace(one, **most))


def useful_offloading(
    base: GroupModel, rows: Ints, ranges: Ranges, limits: Limits, step_s: float
) -> Strategies | None:
    """The strategies that offload, of `rows`, that a plan no slower than `step_s` may have: priced.

    None where no plan is, whatever its stages offload.
    """
    job, group = base.job, base.group
    away = offload_tuples(job, group, base.space, rows)
    if len(away) and step_s < math.inf:
        blocks, num_rows = blocks_of(away), len(base.strategies)
        num_blocks = len(blocks.eased)
        both = blocks.eased.joined(blocks.lean).priced(job, group.num_stages, group.schedule)
        whole = GroupModel(job, group, base.strategies.joined(both), base.space)
        whole.lines(0)  # read together, then divided
        row = np.arange(len(whole.strategies))
        eased = whole.take(row < num_rows + num_blocks)
        lean = whole.take((row < num_rows) | (row >= num_rows + num_blocks))
        room = capacity(eased, ranges, limits, step_s, coarse=True, lean=lean)
        if not room.suffices:
            return None
        away = away.take(room.useful[num_rows:][blocks.block])
    if not len(away):
        return base.strategies.take(np.zeros(0, dtype=np.int64))
    return away.priced(job, group.num_stages, group.schedule)
