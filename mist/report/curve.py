"""How many GPUs to rent, as a picture: tokens per second, and dollars per million tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mist.plans.objectives import Candidate
from mist.report.png_file import png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curve_png(model: str, candidates: Sequence[Candidate], index: int) -> bytes:
    """The picture as a PNG file's content; the same candidates give the same bytes."""
    return png_of(curve(model, candidates, index))


def curve(model: str, candidates: Sequence[Candidate], index: int) -> "Figure":
    """Tokens per second over GPUs, a line for each cluster, the candidate at `index` marked.

    Shaded: the uncertainty of the prediction. Below, where there are prices, what a million tokens
    cost.
    """
    from matplotlib.figure import Figure

    able = [one for one in candidates if one.estimate]
    priced = [one for one in able if one.usd_per_million_tokens is not None]
    figure = Figure(figsize=(8.0, 7.0 if priced else 4.5), layout="constrained")
    panels = figure.subplots(2 if priced else 1, squeeze=False)[:, 0]
    # What takes longer is slower: the ends of the interval change places.
    speeds = [(1 / high, 1 / low) for low, high in _step_spans(able)]
    _lines(panels[0], able, [one.tokens_per_s for one in able], speeds)
    panels[0].set(ylabel="predicted tokens/s")
    marked = [(panels[0], candidates[index].tokens_per_s)]
    if priced:
        costs = [one.usd_per_million_tokens or 0.0 for one in priced]
        _lines(panels[1], priced, costs, _step_spans(priced))
        panels[1].set(ylabel="predicted $ per 1 M tokens")
        if (usd := candidates[index].usd_per_million_tokens) is not None:
            marked.append((panels[1], usd))
    for axes, value in marked:
        at = ([candidates[index].num_gpus], [value])
        axes.scatter(*at, marker="*", s=220, color="tab:red", label="plan", zorder=3)
    for axes in panels:
        axes.set(xlabel="GPUs", xlim=(0, None), ylim=(0, None))
        axes.legend()
    panels[0].set_title(f"{model}: how many GPUs", parse_math=False)
    return figure


def _step_spans(candidates: Sequence[Candidate]) -> list[tuple[float, float]]:
    """The intervals of the steps: measured over predicted."""
    known = [one.estimate.uncertainty for one in candidates if one.estimate]
    return [(each.step_low_ratio, each.step_high_ratio) for each in known]


def _lines(
    axes: "Axes",
    candidates: Sequence[Candidate],
    values: Sequence[float],
    spans: Sequence[tuple[float, float]],
) -> None:
    """A line for each cluster; `spans`: the interval of each value, as ratios of it."""
    for cluster in dict.fromkeys(one.cluster for one in candidates):
        own = sorted(
            (one.num_gpus, value, value * low, value * high)
            for one, value, (low, high) in zip(candidates, values, spans, strict=True)
            if one.cluster == cluster
        )
        gpus, middle, low_ends, high_ends = zip(*own, strict=True)
        (line,) = axes.plot(gpus, middle, marker="o", label=cluster)
        axes.fill_between(gpus, low_ends, high_ends, color=line.get_color(), alpha=0.15)
