"""How many GPUs, and of which cluster: one search for each, and the best by the objective.

The model is traced once; its costs are compiled once for each runtime as it is calibrated. A single
number of GPUs of a single cluster is one plain search.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from mist.errors import Infeasible, InputError
from mist.pareto.strategies import refuse_unknown
from mist.plans.objectives import OBJECTIVES, Candidate, Objective, chosen
from mist.plans.plan import Plan
from mist.plans.search_space import SearchSpace
from mist.platform import Platform
from mist.progress import is_due
from mist.symbolic.load_programs import quiet
from mist.symbolic.program import ModelPrograms
from mist.workflow.advice import what_fits
from mist.workflow.gpu_counts import Counts, counts_of
from mist.workflow.planning import (
    DEFAULT_EFFORT,
    Effort,
    Planned,
    make_plan,
    search_plan,
)
from mist.workflow.request import Question, compiled, platform_of

NO_PRICE: Final = "nobody said"
LEAST_PRICE_USD: Final = 1e-6
MOST_PRICE_USD: Final = 1e6
MOST_TOKENS_TRAINED: Final = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What may be rented, and for what: numbers of GPUs of clusters, prices, tokens to train on.

    `clusters`: names, None for the device's own; `prices_usd`: per GPU and hour, none, one for all,
    or one for each cluster. Raises InputError for what cannot be.
    """

    counts: Counts
    clusters: tuple[str | None, ...] = (None,)
    prices_usd: tuple[float, ...] = ()
    tokens: float | None = None

    def __post_init__(self) -> None:
        if len(set(self.clusters)) < len(self.clusters):
            raise InputError(f"--cluster {_listed(self.clusters)}: a cluster is named twice.")
        if len(self.prices_usd) not in (0, 1, len(self.clusters)):
            raise InputError(
                f"--price {_listed(self.prices_usd)}: {len(self.prices_usd)} prices for "
                f"{len(self.clusters)} clusters. Give one for all, or one for each."
            )
        for price in self.prices_usd:
            if not LEAST_PRICE_USD <= price <= MOST_PRICE_USD:
                raise InputError(
                    f"--price {price:g} is no number of USD per GPU hour from {LEAST_PRICE_USD:g} "
                    f"to {MOST_PRICE_USD:g}."
                )
        if self.tokens is not None and not 1 <= self.tokens <= MOST_TOKENS_TRAINED:
            raise InputError(
                f"--tokens {self.tokens:g} is no number of tokens from 1 to "
                f"{MOST_TOKENS_TRAINED:g}. Try --tokens 2e12."
            )


def offer_of(gpus: str, clusters: str | None, price: str | None, tokens: float | None) -> Offer:
    """What `--gpus`, `--cluster`, `--price` and `--tokens` say. Raises InputError."""
    names: tuple[str | None, ...] = (None,) if clusters is None else tuple(clusters.split(","))
    try:
        prices = tuple(float(word) for word in price.split(",")) if price is not None else ()
    except ValueError:
        raise InputError(
            f"--price {price}: expected USD per GPU hour (2.5), or one for each cluster (2.5,4)."
        ) from None
    return Offer(counts=counts_of(gpus), clusters=names, prices_usd=prices, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rented:
    """The plan that the objective prefers, and all candidates; `index`: that of the plan."""

    planned: Planned
    candidates: tuple[Candidate, ...]
    index: int


def rent(
    question: Question, offer: Offer, space: SearchSpace, effort: Effort = DEFAULT_EFFORT
) -> Rented:
    """Plan for every number of GPUs and cluster of an offer, and choose.

    The numbers of GPUs and the cluster of `question` do not matter. Raises InputError for what
    cannot be used or misses a price or tokens, Infeasible when nothing fits anywhere.
    """
    asked = tuple(_asked(question, offer))
    _check_needs(asked, offer, effort.objective)
    refuse_unknown(space, asked[0].platform.runtime)  # the same for all, before a model is traced
    if len(asked) == 1:
        found: list[Planned | str] = [make_plan(asked[0].question, space, effort)]
    else:
        found = _searched(asked, space, effort)
    candidates = tuple(map(_candidate, asked, found))
    index = chosen(candidates, effort.objective)
    planned = found[index]
    assert isinstance(planned, Planned), "a candidate without a plan was chosen"
    plan = _told(planned.plan, candidates, offer)
    return Rented(planned=replace(planned, plan=plan), candidates=candidates, index=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One candidate before its search; `platform`: one GPU of its cluster."""

    question: Question
    platform: Platform
    price_usd: float | None
    price_source: str


def _asked(question: Question, offer: Offer) -> Sequence[_Asked]:
    """Every cluster with every number of GPUs, in the order of the clusters."""
    found = []
    for index, cluster in enumerate(offer.clusters):
        single = replace(question, cluster=cluster, num_gpus=1)
        platform = platform_of(single)
        price_usd, source = price_of(platform, offer, index)
        for num_gpus in offer.counts.of(platform.cluster):
            found.append(
                _Asked(
                    question=replace(single, num_gpus=num_gpus),
                    platform=platform,
                    price_usd=price_usd,
                    price_source=source,
                )
            )
    return found


def price_of(platform: Platform, offer: Offer, index: int) -> tuple[float | None, str]:
    """USD per GPU hour of the cluster at `index` of an offer, and who says so."""
    if offer.prices_usd:
        return offer.prices_usd[index if len(offer.prices_usd) > 1 else 0], "--price"
    price = platform.cluster.price_per_gpu_hour_usd
    return (price.value, f"{price.kind}: {price.source}") if price else (None, NO_PRICE)


def _check_needs(asked: Sequence[_Asked], offer: Offer, objective: Objective) -> None:
    """Refuse an objective that misses a price or tokens before anything is searched."""
    needs = OBJECTIVES[objective].needs
    if needs == "tokens" and offer.tokens is None:
        raise InputError(f"--objective {objective}: how many tokens? Try --tokens 2e12.")
    if needs != "price":
        return
    names = {one.platform.cluster.name for one in asked if one.price_usd is None}
    if names:
        raise InputError(
            f"--objective {objective}: no price for {', '.join(sorted(names))}. Give --price "
            "USD per GPU hour, or set price_per_gpu_hour_usd: {value, source, kind} in the "
            "cluster's YAML."
        )


def _searched(asked: Sequence[_Asked], space: SearchSpace, effort: Effort) -> list[Planned | str]:
    """The plan of every candidate, or why it has none. Raises where none has a plan."""
    known: dict[str, ModelPrograms] = {}
    found: list[Planned | str] = []
    refusals: list[Infeasible | InputError] = []
    for number, one in enumerate(asked, 1):
        key = one.platform.runtime_hash
        if key not in known:
            known[key] = compiled(
                replace(one.question, num_gpus=1, levels=space.levels, heads=space.head),
                effort.progress,
            )
        if is_due(number, len(asked)):
            effort.progress(f"candidate {number} of {len(asked)}: {_name(one)}")
        try:
            found.append(
                search_plan(one.question, known[key], space, replace(effort, progress=quiet))
            )
        # A candidate without a plan is a row of the table; only if all have none is it an error.
        except (Infeasible, InputError) as refusal:
            refusals.append(refusal)
            found.append(str(refusal))
    if len(refusals) == len(asked):
        largest = max(asked, key=lambda one: one.question.num_gpus)
        fix = what_fits(known[largest.platform.runtime_hash], space, largest.question)
        _refuse(asked, refusals, fix)
    return found


def _refuse(
    asked: Sequence[_Asked], refusals: Sequence[Infeasible | InputError], fix: str
) -> NoReturn:
    """Nothing fits anywhere, or nothing can be used: every reason in a line, and what to try."""
    lines = "".join(
        f"\n  {_name(one)}: {refusal}" for one, refusal in zip(asked, refusals, strict=True)
    )
    words = f"None of the {len(asked)} candidates has a plan:{lines}"
    if any(isinstance(refusal, Infeasible) for refusal in refusals):
        raise Infeasible(f"{words}\n{fix}")
    raise InputError(words)


def _name(one: _Asked) -> str:
    return f"{one.question.num_gpus} x {one.platform.cluster.name}"


def _candidate(one: _Asked, found: Planned | str) -> Candidate:
    return Candidate(
        num_gpus=one.question.num_gpus,
        cluster=one.platform.cluster.name,
        device=one.platform.device.name,
        price_usd=one.price_usd,
        price_source=one.price_source,
        estimate=None if isinstance(found, str) else found.plan.estimate,
        why=found if isinstance(found, str) else "",
    )


def _told(plan: Plan, candidates: Sequence[Candidate], offer: Offer) -> Plan:
    """The plan with what it was chosen from, and for which price and tokens."""
    said: dict[str, str | int | float] = {}
    if len(candidates) > 1:
        counts: dict[str, list[str]] = {}
        for candidate in candidates:
            counts.setdefault(candidate.cluster, []).append(str(candidate.num_gpus))
        said["candidates"] = "; ".join(
            f"{name}: {', '.join(numbers)} GPUs" for name, numbers in counts.items()
        )
    if len(candidates) > 1 or offer.prices_usd:
        said |= _prices(candidates)
    if offer.tokens is not None:
        said["tokens"] = offer.tokens
    provenance = plan.provenance
    return replace(plan, provenance=replace(provenance, search=provenance.search | said))


def _prices(candidates: Sequence[Candidate]) -> Mapping[str, str]:
    prices = {
        one.cluster: f"{one.cluster}: {one.price_usd:g} ({one.price_source})"
        for one in candidates
        if one.price_usd is not None
    }
    return {"price_per_gpu_hour_usd": "; ".join(prices.values())} if prices else {}


def _listed(values: Sequence[object]) -> str:
    return ",".join(str(value) for value in values)
