"""What a number of GPUs gives and costs: one plan for each, and the one that an objective chooses.

    usd per token = price / 3600 * GPUs / (tokens per second)
    time for N tokens = N / (tokens per second)
    scaling = tokens per second and GPU, over those of the cluster's smallest number that fits

All from predicted step times, so the relative error of a step time is that of every figure here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mist.plans.plan import Estimate
from mist.plans.workload import Objective
from mist.units import HOUR_S, MILLION


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A number of GPUs of a cluster, and what its best plan is predicted to reach.

    `estimate`: None where there is no plan, and `why` says why not. `price_usd`: per GPU and hour,
    None where nobody said; `price_source`: who said it.
    """

    num_gpus: int
    cluster: str
    device: str
    price_usd: float | None
    price_source: str
    estimate: Estimate | None
    why: str

    @property
    def tokens_per_s(self) -> float:
        """Predicted; 0 without a plan."""
        return self.estimate.tokens_per_s if self.estimate else 0.0

    @property
    def peak_bytes(self) -> float:
        """Of the fullest GPU; infinite without a plan."""
        stages = self.estimate.stages if self.estimate else ()
        return max((stage.peak_bytes for stage in stages), default=math.inf)

    @property
    def usd_per_hour(self) -> float | None:
        """Of all GPUs."""
        return None if self.price_usd is None else self.num_gpus * self.price_usd

    @property
    def usd_per_million_tokens(self) -> float | None:
        """None without a price or a plan."""
        return self.usd_for(MILLION)

    def seconds_for(self, tokens: float) -> float | None:
        """How long that many tokens take; None without a plan."""
        return tokens / self.tokens_per_s if self.estimate else None

    def usd_for(self, tokens: float) -> float | None:
        """What that many tokens cost; None without a price or a plan."""
        seconds, usd_per_hour = self.seconds_for(tokens), self.usd_per_hour
        if seconds is None or usd_per_hour is None:
            return None
        return seconds / HOUR_S * usd_per_hour

    def scaling_ratio(self, candidates: Sequence["Candidate"]) -> float:
        """Tokens per second and GPU, over those of the smallest candidate of the cluster."""
        same = [other for other in candidates if other.cluster == self.cluster and other.estimate]
        least = min(same, key=lambda other: other.num_gpus)
        return self.tokens_per_s / self.num_gpus / (least.tokens_per_s / least.num_gpus)


_COSTS: Final[Mapping[Objective, Callable[[Candidate], float]]] = MappingProxyType(
    {
        Objective.THROUGHPUT: lambda candidate: -candidate.tokens_per_s,
        Objective.MEMORY: lambda candidate: candidate.peak_bytes,
        Objective.TOKENS_PER_DOLLAR: lambda candidate: (
            math.inf if (usd := candidate.usd_per_million_tokens) is None else usd
        ),
        Objective.TIME_TO_TOKENS: lambda candidate: -candidate.tokens_per_s,
    }
)
"""What each objective makes least."""


def chosen(candidates: Sequence[Candidate], objective: Objective) -> int:
    """The index of the candidate with a plan that the objective prefers.

    Of equals the one of fewest GPUs, then the fastest, and then the first name, in whatever order
    they are given.
    Raises ValueError when none has a plan.
    """
    able = [(index, each) for index, each in enumerate(candidates) if each.estimate]
    cost = _COSTS[objective]

    def rank(item: tuple[int, Candidate]) -> tuple[float, int, float, str]:
        each = item[1]
        return cost(each), each.num_gpus, -each.tokens_per_s, each.cluster

    return min(able, key=rank)[0]
