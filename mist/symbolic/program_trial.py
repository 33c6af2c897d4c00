"""One run of a model's programs on a small job, to see that they compute.

What a cache keeps may be well formed and still be nonsense: a name that no strategy has, a function
with more arguments than it takes, a size that is negative or no number. All of it shows where the
programs run once, from the strategy to the formulas of a stage: one stage of all layers on one
device, with stand-ins for the laws of a platform. A figure that is wrong and looks right does not.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from mist.model.summary import ModelFacts
from mist.plans.plan import DEFAULT_SCHEDULE
from mist.plans.uniform_stages import uniform_layout
from mist.plans.workload import MemoryLevel
from mist.symbolic.columns import Placement, layout_inputs
from mist.symbolic.pipeline_costs import PipelineInputs, pipeline_outputs
from mist.symbolic.program import (
    LAWS,
    MEMORY_PARTS,
    SEARCHED,
    TIME_PARTS,
    Column,
    Law,
    ModelPrograms,
    bound_programs,
)

FAULTS: Final = (
    *(ValueError, TypeError, LookupError, AttributeError, NameError, ArithmeticError),
    *(SyntaxError, RecursionError, MemoryError),
)
# Short enough for every model, unless what was traced begins later.
NUM_TOKENS: Final = 4096
NUM_MICRO_BATCHES: Final = 2
ROUNDING: Final = 1e-9  # what is left of sums that cancel, of the largest number


def computes(programs: ModelPrograms) -> bool:
    """Whether the programs run, and give numbers that are finite and not negative."""
    try:
        with np.errstate(all="ignore"):
            columns = list(_outputs(programs))
    except FAULTS:
        return False
    values = np.concatenate(columns)
    return bool(np.isfinite(values).all() and (values >= -ROUNDING * values.max()).all())


def _outputs(programs: ModelPrograms) -> Iterator[Column]:
    """What planning reads of the programs. Raises FAULTS where they do not give it."""
    facts = programs.facts
    model = bound_programs(programs, stand_ins())
    inputs = _inputs(facts)
    (stage,) = pipeline_outputs(model, inputs)
    names = [f"{part}_s" for part in TIME_PARTS] + [f"{part}_bytes" for part in MEMORY_PARTS]
    yield from (stage[name] for name in (*SEARCHED, *names))
    found = model.search({**model.search_terms_of(inputs.strategy), **inputs.rest})
    yield from (found[name] for name in SEARCHED)
    sizes = {name: inputs.strategy[name] for name in "bst"}
    flop = model.flop(sizes)
    yield from (flop[name] for name in ("embed", "head", *map(str, range(facts.num_kinds))))
    yield from model.domain(sizes).values()


def _inputs(facts: ModelFacts) -> PipelineInputs:
    layout = uniform_layout(
        {},
        chunk_layers=[facts.num_layers],
        memory=[{MemoryLevel.NONE: facts.num_layers}],
        num_micro_batches=NUM_MICRO_BATCHES,
        schedule=DEFAULT_SCHEDULE,
        shards_sequence=False,
    )
    where = Placement(seq_len=_seq_len(facts), gpus_per_node=1, spans_nodes=False)
    strategy, rest = layout_inputs(where, facts.layer_kinds(), layout)
    return PipelineInputs(strategy=_columns(strategy), rest=_columns(rest), ends=(1,))


def _columns(values: Mapping[str, ArrayLike]) -> dict[str, Column]:
    """One number each."""
    return {name: np.asarray(value, dtype=np.float64).reshape(1) for name, value in values.items()}


def _seq_len(facts: ModelFacts) -> int:
    """A sequence that the trace holds for."""
    lengths = facts.lengths
    ends = (each for each in (lengths.last, facts.max_seq_len) if each is not None)
    longest = min((NUM_TOKENS, *ends))
    return max(longest - longest % lengths.multiple, lengths.first)


def stand_ins() -> dict[str, Law]:
    """In the place of each law: the sum of as many arguments as that law may have."""
    # Streams that run together are no shorter than each of them: a sum is one way to be that.
    return {name: partial(_sum, counts) for name, counts in LAWS.items()}


def _sum(counts: tuple[int, ...], *arguments: ArrayLike) -> Column:
    if len(arguments) not in counts:
        raise TypeError(f"{len(arguments)} arguments of a law that takes {counts}")
    return np.asarray(sum(map(np.asarray, arguments)), dtype=np.float64)
