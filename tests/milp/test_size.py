"""The work of the dynamic program on the sizes of the bars, counted, not timed.

Seconds are measured by benchmarks/inter_stage.py. What is counted here is what they depend on:
scenarios, and the moves that one scenario looks at.
"""

from dataclasses import replace

import numpy as np
import pytest

from mist.milp import InterStageProblem, solve
from mist.milp.moves import positions
from mist.milp.pruning import pruned
from tests.milp.oracle import dense_problem


def on_units(problem: InterStageProblem, num_units: int) -> InterStageProblem:
    """Each cell on 1, 2 and 4 units; twice the units gain a factor of 1.87."""
    cells = tuple(
        replace(
            cell, units=units, stable_s=cell.stable_s / units**0.9, lone_s=cell.lone_s / units**0.9
        )
        for cell in problem.cells
        for units in (1, 2, 4)
    )
    return replace(problem, cells=cells, num_units=num_units)


def sized(num_layers: int, num_stages: int, num_points: int, g: int) -> InterStageProblem:
    return dense_problem(
        1,
        num_layers=num_layers,
        num_stages=num_stages,
        num_micro_batches=g,
        num_points=num_points,
    )


# Name: the problem, and the scenarios that it took when this was written.
SIZES = {
    "80 x 16, G 1": (sized(80, 16, 60, 1), 96),
    "80 x 16, G 4": (sized(80, 16, 60, 4), 162),
    "80 x 16, G 64": (sized(80, 16, 60, 64), 112),
    "126 x 63, G 64": (sized(126, 63, 30, 64), 110),
    "48 x 24 on 48, G 1": (on_units(sized(48, 24, 10, 1), 48), 24),
    "48 x 24 on 48, G 64": (on_units(sized(48, 24, 10, 64), 48), 119),
    "126 x 64 on 128, G 64": (on_units(sized(126, 64, 10, 64), 128), 129),
}


@pytest.mark.parametrize("name", SIZES)
def test_scenarios_do_not_double(name: str) -> None:
    problem, num_nodes = SIZES[name]
    found = solve(problem, method="dp")
    assert found is not None
    assert found.num_nodes <= 2 * num_nodes


def test_a_cut_off_near_the_optimum_leaves_few_moves() -> None:
    problem = on_units(sized(48, 24, 10, 64), 48)
    found, moves = solve(problem, method="dp"), positions(problem)
    assert found is not None
    assert moves is not None
    near = pruned(moves, num_micro_batches=64, min_delta_s=-10.0, cutoff_s=1.01 * found.step_s)
    assert near is not None
    assert sum(p.cell.size for p in near) < 0.2 * sum(p.cell.size for p in moves)


def test_pruning_at_the_optimum_leaves_its_own_moves() -> None:
    # Just above the optimum its cells survive, just below nothing faster is left to find.
    problem = on_units(sized(24, 12, 10, 4), 24)
    found, moves = solve(problem, method="dp"), positions(problem)
    assert found is not None
    assert moves is not None
    cells = [problem.cells[choice.cell] for choice in found.choices]
    first = min(float(np.min(c.lone_s - c.stable_s)) for c in problem.cells if c.stage == 0)
    cutoff_s = found.step_s * (1 + 1e-9)
    near = pruned(moves, num_micro_batches=4, min_delta_s=first, cutoff_s=cutoff_s)
    assert near is not None
    for stage, position in enumerate(reversed(near)):
        assert any(problem.cells[index] is cells[stage] for index in position.cell)
