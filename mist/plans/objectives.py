"""What a number of GPUs gives and costs: one plan for each, and the one that an objective chooses.

    usd per token = price / 3600 * GPUs / (tokens per second)
    time for N tokens = N / (tokens per second)
    scaling = tokens per second and GPU, over those of the cluster's smallest number that fits

All from predicted step times, so the relative error of a step time is that of every figure here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from mist.plans.plan import Estimate
from mist.units import HOUR_S, MILLION


class Objective(StrEnum):
    """What the best plan is.

    Most tokens per second, least memory of the fullest GPU, most tokens for the money, or the
    shortest time for a number of tokens. For one number of GPUs of one cluster all but MEMORY ask
    for the fastest step; they differ in which number of GPUs, and which cluster, they choose.
    """

    THROUGHPUT = "throughput"
    MEMORY = "memory"
    TOKENS_PER_DOLLAR = "tokens-per-dollar"
    TIME_TO_TOKENS = "time-to-tokens"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveRow:
    """What an objective is.

    Args:
        cost: what it makes least, over numbers of GPUs and clusters, each with its plan.
        needs: what must be known of the offer: "tokens" to train on, a "price".
        least_memory: whether a plan may hold no more than the least that any layout can; of those
            that do the fastest is best, as it is of all layouts under every other objective.
        note: what a report says of a plan that was found so.
    """

    cost: Callable[[Candidate], float]
    needs: Literal["tokens", "price"] | None = None
    least_memory: bool = False
    note: str = ""


OBJECTIVES: Final[Mapping[Objective, ObjectiveRow]] = MappingProxyType(
    {
        Objective.THROUGHPUT: ObjectiveRow(cost=lambda candidate: -candidate.tokens_per_s),
        Objective.MEMORY: ObjectiveRow(
            cost=lambda candidate: candidate.peak_bytes,
            least_memory=True,
            note="objective memory: the fullest GPU holds the least that any layout of this search "
            "reaches, and of those that reach it this one is the fastest",
        ),
        Objective.TOKENS_PER_DOLLAR: ObjectiveRow(
            cost=lambda candidate: (
                math.inf if (usd := candidate.usd_per_million_tokens) is None else usd
            ),
            needs="price",
        ),
        Objective.TIME_TO_TOKENS: ObjectiveRow(
            cost=lambda candidate: -candidate.tokens_per_s, needs="tokens"
        ),
    }
)
"""What is known of each objective."""


def chosen(candidates: Sequence[Candidate], objective: Objective) -> int:
    """The index of the candidate with a plan that the objective prefers; of equals the smallest.

    Raises ValueError when none has a plan.
    """
    able = [index for index, candidate in enumerate(candidates) if candidate.estimate]
    cost = OBJECTIVES[objective].cost
    return min(able, key=lambda index: (cost(candidates[index]), candidates[index].num_gpus))
