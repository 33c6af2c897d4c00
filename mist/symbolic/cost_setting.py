"""What the expressions of a model's costs are built for."""

from dataclasses import dataclass
from operator import attrgetter

import sympy
from sympy import Expr

from mist.model.graph import T
from mist.plans.numerics import Numerics
from mist.plans.workload import Optimizer
from mist.platform.runtime import Runtime
from mist.platform.states import States
from mist.symbolic import symbols as sym


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSetting:
    """The runtime's habits, the formats of numbers and the optimizer.

    `whole`: a part of the model that runs on all tokens even under sequence parallelism.
    """

    runtime: Runtime
    numerics: Numerics
    optimizer: Optimizer
    whole: bool = False

    @property
    def sequence_shards(self) -> Expr:
        """How many ways sequence parallelism divides a replicated activation."""
        divides = self.runtime.knobs.sequence_parallel and not self.whole
        return T if divides else sympy.Integer(1)

    @property
    def states(self) -> States:
        """What lives of a parameter. Raises PlatformError for an optimizer without moments."""
        return self.runtime.states_of(self.numerics.compute, self.optimizer)


def figure(runtime: Runtime, path: str) -> Expr:
    """A figure of a runtime in an expression, by its path ("host.step_s").

    What the runtime does not do costs programs nothing: 0 stays a number.
    """
    return sym.FIGURES[path] if attrgetter(path)(runtime).value else sympy.Integer(0)
