"""Compiled expressions without sympy: source text of numpy functions, and what it is bound to.

A program is what `mist.symbolic.compile` prints from expressions: named inputs, named outputs, one
assignment per common subexpression. Binding runs its text with a platform's laws and a few
functions of numpy in scope, and nothing else. The text is of this process: `program_codec` writes
what is kept between runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from operator import attrgetter
from types import CodeType
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.model.summary import ModelFacts, Traffic
from mist.plans.host_memory import pinned_bytes
from mist.plans.plan import MemoryPart, TimePart
from mist.plans.workload import HeadMode, MemoryLevel
from mist.platform import OpCosts

# What the search reads of a stage.
SEARCHED = (
    *("stable_s", "lone_s", "weight_s", "peak_bytes", "begin_bytes", "end_bytes", "step_bytes"),
    *("last_bytes", "host_bytes"),
)

# The functions of numpy that sympy prints for what `mist.trace.codec` lets into a trace.
FUNCTIONS = (
    *("maximum", "minimum", "mod", "floor", "ceil", "sqrt", "log", "exp", "abs", "sign"),
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    *("logical_and", "logical_or", "logical_not", "select"),
)


def select(
    conditions: Sequence[ArrayLike], values: Sequence[ArrayLike], default: float
) -> ArrayLike:
    """numpy's `select`: the value of the first condition that holds, else the default.

    Most columns are one layout, where numpy's own takes ten times as long. Raises TypeError for
    conditions that are none, as numpy does.
    """
    result: ArrayLike = default
    for condition, value in [*zip(conditions, values, strict=True)][::-1]:
        if np.asarray(condition).dtype != np.bool_:
            raise TypeError("a condition is neither true nor false")
        result = np.where(condition, value, result)
    return result


SCOPE = {
    "__builtins__": {},
    "nan": np.nan,
    "inf": np.inf,
    "reduce": reduce,  # as sympy prints Max
    **{name: getattr(np, name) for name in FUNCTIONS},
    "select": select,
}

TIME_PARTS: tuple[TimePart, ...] = get_args(TimePart)
MEMORY_PARTS: tuple[MemoryPart, ...] = get_args(MemoryPart)

Column = NDArray[np.float64]
Columns = Mapping[str, ArrayLike]
Law = Callable[..., ArrayLike]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Source of `def program(<inputs>)`, returning a tuple in the order of `outputs`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrograms:
    """Everything that planning computes of a model under a runtime, and the model's facts.

    `costs` and `terms` are of the strategy (`estimate.rank_columns`), `terms` also of the costs,
    `search_terms` those of them that the search needs; `search` and `stage` of terms and layout:
    stable_s, lone_s, weight_s, peak_bytes, host_bytes, and for `stage` every part of them. `flop`:
    FLOPs that training needs of each block at b, s, t. `domain`: the relations (by their text)
    under which all of it holds, at b, s, t and head. `heads`: how the head may run, as priced.
    """

    facts: ModelFacts
    costs: Program
    terms: Program
    search_terms: Program
    search: Program
    stage: Program
    flop: Program
    domain: Program
    heads: tuple[HeadMode, ...] = (HeadMode.NONE,)

    @property
    def levels(self) -> tuple[MemoryLevel, ...]:
        """The memory levels that are priced: of those that convert layers, the ones traced."""
        return tuple(level for level in MemoryLevel if f"{level.column}_0" in self.search.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A program ready to run. Columns broadcast; results have their common shape, float64."""

    program: Program
    call: Callable[..., Sequence[ArrayLike]]

    def __call__(self, columns: Columns) -> dict[str, Column]:
        """The outputs by name."""
        args = [np.asarray(columns[name], dtype=np.float64) for name in self.program.inputs]
        shape = np.broadcast_shapes(*(arg.shape for arg in args))
        # Figures that are absurd together overflow; `estimate` refuses what comes of them.
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.call(*args)
        return {
            name: _spread(value, shape)
            for name, value in zip(self.program.outputs, values, strict=True)
        }


def _spread(value: ArrayLike, shape: tuple[int, ...]) -> Column:
    """The value at that shape; a view of one number takes numpy longer than a short copy."""
    column = np.asarray(value, dtype=np.float64)
    return column if column.shape == shape else np.full(shape, column)


def bind(program: Program, laws: Mapping[str, Law]) -> Bound:
    """Run the program's definition with the laws in scope."""
    scope: dict[str, object] = {**SCOPE, **laws}
    exec(compiled(program.source), scope)
    return Bound(program=program, call=scope["program"])  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def compiled(source: str) -> CodeType:
    """The code of a program's text; programs of stages are the same for many models."""
    return compile(source, "<mist program>", "exec")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The programs of a model, bound to a platform's laws."""

    costs: Bound
    block_terms: Bound
    search_terms: Bound
    search: Bound
    stage: Bound
    flop: Bound
    domain: Bound

    def terms(self, strategy: Columns) -> dict[str, Column]:
        """`term_*` columns of strategies given as `estimate.rank_columns`."""
        return self.block_terms({**strategy, **self.costs(strategy)})

    def search_terms_of(self, strategy: Columns) -> dict[str, Column]:
        """The same, of what `search` needs."""
        return self.search_terms({**strategy, **self.costs(strategy)})


def stage_model(programs: ModelPrograms, costs: OpCosts) -> StageModel:
    """Bind a model's programs to what operations cost on a platform."""
    return bound_programs(programs, _laws(costs))


def bound_programs(programs: ModelPrograms, laws: Mapping[str, Law]) -> StageModel:
    """Bind a model's programs to laws by name."""
    return StageModel(
        costs=bind(programs.costs, laws),
        block_terms=bind(programs.terms, laws),
        search_terms=bind(programs.search_terms, laws),
        search=bind(programs.search, laws),
        stage=bind(programs.stage, laws),
        flop=bind(programs.flop, {}),
        domain=bind(programs.domain, {}),
    )


# Figures of the runtime that whole runs say something of. In a program each is a law of no
# arguments, so that one text serves every value that it may have.
FIGURES = (
    *("kernels.memory_time_scale", "kernels.attention_time_scale", "kernels.scores_time_scale"),
    *("host.layer_launch_s", "host.tensor_parallel_launch_s", "host.pipeline_launch_s"),
    *("host.micro_batch_launch_s", "host.step_s", "overlap.tensor_parallel_time_scale"),
)


def figure_name(path: str) -> str:
    """How programs call a figure of the runtime: "host.step_s" as runtime_host_step_s."""
    return f"runtime_{path.replace('.', '_')}"


# How many arguments each law may have.
LAWS: Mapping[str, tuple[int, ...]] = {
    **{"gemm_s": (4,), "attention_forward_s": (6,), "attention_backward_s": (6,)},
    **{"all_gather_s": (3,), "reduce_scatter_s": (3,), "all_reduce_s": (3,), "p2p_s": (2,)},
    **{"together_s": (2, 3, 4), "to_device_s": (1,), "to_host_s": (1,), "pinned_bytes": (1,)},
    **{f"memory_{traffic}_s": (2,) for traffic in Traffic},
    **{figure_name(path): (0,) for path in FIGURES},
}


def _laws(costs: OpCosts) -> dict[str, Law]:
    """The platform's laws under the names that the expressions use."""
    laws: dict[str, Law] = {
        "gemm_s": costs.gemm_s,
        "attention_forward_s": costs.attention_forward_s,
        "attention_backward_s": costs.attention_backward_s,
        "all_gather_s": costs.all_gather_s,
        "reduce_scatter_s": costs.reduce_scatter_s,
        "all_reduce_s": costs.all_reduce_s,
        "p2p_s": costs.p2p_s,
        "to_device_s": costs.host_to_device_s,
        "to_host_s": costs.device_to_host_s,
        "together_s": costs.together_s,
        "pinned_bytes": pinned_bytes if costs.device.kernels == "cuda" else np.asarray,
    }
    memory = {f"memory_{name}_s": partial(costs.memory_s, traffic=name) for name in Traffic}
    figures = {
        figure_name(path): partial(float, attrgetter(path)(costs.runtime).value) for path in FIGURES
    }
    return laws | memory | figures
