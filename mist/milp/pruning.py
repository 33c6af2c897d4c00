"""Which moves of the inter-stage problem a plan faster than a cut-off may still take.

A plan that takes a move of position q has, with the least t, u and f = (t - w) / v of its frontier,
the states before and after it and d_0 the least u - f of the first stage,

    theta >= max ( least bottleneck of a path up to the move, t, least bottleneck of one after it )
    E     >= max ( d_0 + least sum of f of a path through the move,  u + least sum of f behind it )
    T     =  (G - 1) * theta + E

Both paths are relaxations: they take the fastest point of every cell, and may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mist.milp.moves import Position, linked
from mist.milp.problem import Floats


def pruned(
    positions: Sequence[Position],
    *,
    num_micro_batches: int,
    min_delta_s: float,
    cutoff_s: float,
) -> tuple[Position, ...] | None:
    """The moves whose bound on T is below the cut-off, seconds; None when none lead to the end.

    `min_delta_s`: d_0.
    """
    least = [_least(position) for position in positions]
    behind = _behind(positions, least)
    # The same recursion on reversed moves, then turned round: both lists go by the same boundary.
    ahead = _behind([_reversed(position) for position in reversed(positions)], least[::-1])[::-1]
    kept = []
    for position, (stable_s, lone_s, fill_s), before, after in zip(
        positions, least, behind[:-1], ahead[1:], strict=True
    ):
        behind_s, ahead_s = before.sum_s[position.source], after.sum_s[position.target]
        exit_s = np.maximum(behind_s + fill_s + ahead_s + min_delta_s, behind_s + lone_s)
        theta_s = np.maximum(before.theta_s[position.source], after.theta_s[position.target])
        step_s = (num_micro_batches - 1) * np.maximum(theta_s, stable_s) + exit_s
        kept.append(position.where(step_s < cutoff_s))
    return linked(kept)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Paths:
    """Least bottleneck and least sum of f of the paths to each state of a boundary, seconds."""

    theta_s: Floats
    sum_s: Floats


def _least(position: Position) -> tuple[Floats, Floats, Floats]:
    """The least t, u and f that each move [M] can have."""
    frontiers = position.frontiers
    stable_s = np.array([points.stable_s[0] for points in frontiers])
    lone_s = np.array([-points.negative_lone_s[-1] for points in frontiers])
    fill_s = np.array([points.fill_s[0] for points in frontiers])
    return stable_s[position.frontier], lone_s[position.frontier], fill_s[position.frontier]


def _behind(
    positions: Sequence[Position], least: Sequence[tuple[Floats, Floats, Floats]]
) -> list[_Paths]:
    """The paths to every boundary, from the one before the first position on."""
    paths = [_Paths(theta_s=np.zeros(1), sum_s=np.zeros(1))]
    for position, (stable_s, _, fill_s) in zip(positions, least, strict=True):
        before, (theta_s, sum_s) = paths[-1], np.full((2, position.num_targets), np.inf)
        through_s = np.maximum(before.theta_s[position.source], stable_s)
        np.minimum.at(theta_s, position.target, through_s)
        np.minimum.at(sum_s, position.target, before.sum_s[position.source] + fill_s)
        paths.append(_Paths(theta_s=theta_s, sum_s=sum_s))
    return paths


def _reversed(position: Position) -> Position:
    """The same moves walked from the first stage to the last."""
    return replace(
        position,
        num_sources=position.num_targets,
        num_targets=position.num_sources,
        source=position.target,
        target=position.source,
    )
