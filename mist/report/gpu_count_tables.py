"""Numbers of GPUs beside each other, for people (a table) and for tools (a list of objects)."""

from collections.abc import Sequence

from mist.plans.objectives import Candidate
from mist.report.tables import say, show
from mist.units import format_count, format_days, format_seconds, format_usd


def print_candidates(candidates: Sequence[Candidate], index: int, tokens: float | None) -> None:
    """A row for each candidate, the one at `index` marked; days and dollars for `tokens`."""
    header = ["GPUs", "cluster", "step", "tokens/s", "per GPU", "scaling", "$ per 1 M tokens"]
    if tokens is not None:
        header += [f"{format_count(tokens)} tokens", "cost"]
    mark = "chosen" if len(candidates) > 1 else ""
    rows = [
        (*_cells(candidate, candidates, tokens), mark if at == index else candidate.why)
        for at, candidate in enumerate(candidates)
    ]
    show(f"Candidates (predicted, {_uncertainty(candidates)})", (*header, ""), rows)
    prices = {
        one.cluster: f"{one.cluster} ${one.price_usd:.4g} ({one.price_source})"
        for one in candidates
        if one.price_usd is not None
    }
    if prices:
        say(f"Prices per GPU hour: {'; '.join(prices.values())}.")
        say("Costs are those of the steps alone: no restarts, evaluation, storage or idle time.")


def cost_words(candidate: Candidate) -> str:
    """Dollars per token of one candidate as a sentence; "" where no price is known."""
    usd = candidate.usd_per_million_tokens
    if usd is None or candidate.price_usd is None:
        return ""
    hour = f"${candidate.price_usd:.4g} per GPU hour, {candidate.price_source}"
    return f"{format_usd(usd)} per 1 M tokens ({hour})."


def _cells(
    candidate: Candidate, candidates: Sequence[Candidate], tokens: float | None
) -> tuple[str, ...]:
    """What a row holds before its last cell; "-" where it is not known."""
    alike = len({one.device for one in candidates}) == 1
    where = candidate.cluster if alike else f"{candidate.cluster} ({candidate.device})"
    head = (str(candidate.num_gpus), where)
    if candidate.estimate is None:
        return (*head, *["-"] * (5 if tokens is None else 7))
    usd = candidate.usd_per_million_tokens
    cells = (
        *head,
        format_seconds(candidate.estimate.step_s),
        format_count(candidate.tokens_per_s),
        format_count(candidate.tokens_per_s / candidate.num_gpus),
        f"{candidate.scaling_ratio(candidates):.0%}",
        "-" if usd is None else format_usd(usd),
    )
    if tokens is None:
        return cells
    seconds, cost = candidate.seconds_for(tokens), candidate.usd_for(tokens)
    days = "-" if seconds is None else format_days(seconds)
    return (*cells, days, "-" if cost is None else format_usd(cost))


def _uncertainty(candidates: Sequence[Candidate]) -> str:
    """How far off times, speeds and costs may be, of the least sure candidate."""
    known = [one.estimate.uncertainty for one in candidates if one.estimate]
    low = min(each.step_low_ratio for each in known)
    high = max(each.step_high_ratio for each in known)
    calibrated = "calibrated" if all(one.calibrated for one in known) else "not calibrated"
    return f"{low - 1:+.0%} to {high - 1:+.0%}, {calibrated}"


def candidates_json(
    candidates: Sequence[Candidate], index: int, tokens: float | None
) -> list[dict[str, object]]:
    """Every candidate with its prediction, or with why it has none (`why`, else "").

    Times in s, money in USD; null where a plan, a price or `tokens` is missing. `step_low_ratio`
    and `step_high_ratio`: between them lies measured over predicted, of the step and of each cost.
    """
    return [
        {
            "num_gpus": one.num_gpus,
            "cluster": one.cluster,
            "device": one.device,
            "chosen": at == index,
            "step_s": one.estimate.step_s if one.estimate else None,
            "tokens_per_s": one.tokens_per_s if one.estimate else None,
            "tokens_per_s_per_gpu": one.tokens_per_s / one.num_gpus if one.estimate else None,
            "scaling_ratio": one.scaling_ratio(candidates) if one.estimate else None,
            "peak_bytes": one.peak_bytes if one.estimate else None,
            "step_low_ratio": one.estimate.uncertainty.step_low_ratio if one.estimate else None,
            "step_high_ratio": one.estimate.uncertainty.step_high_ratio if one.estimate else None,
            "price_per_gpu_hour_usd": one.price_usd,
            "price_source": one.price_source,
            "usd_per_million_tokens": one.usd_per_million_tokens,
            "tokens": tokens,
            "tokens_s": None if tokens is None else one.seconds_for(tokens),
            "tokens_usd": None if tokens is None else one.usd_for(tokens),
            "why": one.why,
        }
        for at, one in enumerate(candidates)
    ]
