"""`mist plan --explain`: what binds a plan, what more of it would bring, what each part gives."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from mist.plans.breakdown import PART_NAMES, step_parts
from mist.plans.host_memory import HostNeed
from mist.plans.plan import Limits, Plan
from mist.report.pictures import Picture, row_rect
from mist.report.tables import say
from mist.report.text_layout import bar, columns, screen_width, wrapped
from mist.units import format_bytes, format_count, format_seconds

BINDING_RATIO: Final = 0.03  # of what there is: less is left of what binds
TELLING_RATIO: Final = 0.01  # of a step: less is not worth a sentence
LEAST_GAIN_RATIO: Final = 0.0005  # less rounds to nothing
BAR_COLUMNS: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedAgain:
    """The fastest layout of one more search; `step_s` None where there is none, and `words` why."""

    name: str
    step_s: float | None
    tokens_per_s: float
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a plan is what it is.

    `bindings`: sentences. `marginals`: the search again, with a little more of one thing, beside
    `now`. `ladder`: the searches of ever larger spaces.
    """

    bindings: tuple[str, ...]
    now: SearchedAgain
    marginals: tuple[SearchedAgain, ...]
    ladder: tuple[SearchedAgain, ...]


def bindings_of(plan: Plan, limits: Limits, host: HostNeed) -> Iterator[str]:
    """Which limits are reached, and what a step waits for: a sentence each."""
    yield _memory_words(plan, limits)
    if host.held_bytes:
        left = 1 - host.needed_bytes / host.limit_bytes
        binds = "binds" if left < BINDING_RATIO else "does not bind"
        yield (
            f"Host memory {binds}: {format_bytes(host.needed_bytes)} of "
            f"{format_bytes(host.limit_bytes)} per node are used"
        )
    parts = step_parts(plan.estimate, plan.num_micro_batches)
    for part, axis in _axes(plan).items():
        share = parts.get(part, 0.0) / plan.estimate.step_s
        if share >= TELLING_RATIO:
            yield f"{PART_NAMES[part].capitalize()} take {share:.1%} of the step: {axis}"
    for part in ("recompute", "bubble", "launch"):
        share = parts.get(part, 0.0) / plan.estimate.step_s
        if share >= TELLING_RATIO:
            yield f"{PART_NAMES[part].capitalize()} takes {share:.1%} of the step"
    compute = parts["compute"] / plan.estimate.step_s
    yield f"Computation itself takes {compute:.1%} of the step"


def _memory_words(plan: Plan, limits: Limits) -> str:
    """The stages that reach what a plan may use; else the fullest one."""
    peaks = [stage.peak_bytes for stage in plan.estimate.stages]
    limit = limits.device_bytes
    full = [i for i, peak in enumerate(peaks) if limit - peak < BINDING_RATIO * limit]
    index = max(range(len(peaks)), key=lambda i: peaks[i])
    left = f"{format_bytes(limit - peaks[index])} of {format_bytes(limit)} are left"
    if not full:
        return f"GPU memory does not bind: on the fullest stage, {index}, {left}"
    if len(full) == 1:
        return f"GPU memory binds on stage {index}: {left}"
    names = ", ".join(map(str, full))
    return f"GPU memory binds on stages {names}: on the fullest, {index}, {left}"


def _axes(plan: Plan) -> dict[str, str]:
    """Which links each kind of transfer goes over, by part of the step."""
    per_node = plan.cluster.gpus_per_node
    slowest = max(range(len(plan.stages)), key=lambda i: plan.estimate.stages[i].stable_s)
    stage = plan.stages[slowest]
    first, count = stage.devices
    within = first // per_node == (first + count - 1) // per_node
    tp_within = stage.tp <= per_node
    links = {True: "links inside a node", False: "the network between nodes"}
    stages_cross = plan.cluster.num_gpus > per_node
    return {
        "tp": f"axis tp, over {links[tp_within]}",
        "dp": f"axis dp, over {links[within]}",
        "p2p": f"axis pp, over {links[not stages_cross]}",
        "offload": "over the link to host memory",
    }


def print_explanation(plan: Plan, explained: Explanation) -> None:
    """What binds; what more would bring; why others lose; the ladder as bars."""
    width = screen_width()
    for line in explanation_lines(plan, explained, width):
        say(line)


def explanation_lines(plan: Plan, explained: Explanation, width: int) -> list[str]:
    """The same, line by line, none wider than `width`."""
    lines = ["", "What binds:"]
    lines += [line for words in explained.bindings for line in wrapped(f"  {words}.", width, 4)]
    now_s = explained.now.step_s
    lines += ["", f"What more would bring (the fastest plan takes {_seconds(now_s)}):"]
    rows = [(f"  {one.name}", *_gain(one, explained.now), one.words) for one in explained.marginals]
    lines += columns(rows, width)
    lines += ["", "Why others lose:"]
    for other in (*plan.alternatives, *plan.excluded):
        slower = f"{other.step_s / plan.estimate.step_s - 1:+.1%}"
        words = f"  {other.layout} ({slower}): {other.reason}; {other.needs}."
        lines += wrapped(words, width, 4)
    lines += ["", "What each part of the search is worth (the fastest plan of each space):"]
    return [*lines, *columns(_ladder_rows(explained.ladder), width)]


def _gain(one: SearchedAgain, now: SearchedAgain) -> tuple[str, str]:
    """The step, and how many more tokens per second than now."""
    if one.step_s is None:
        return "-", "-"
    gain = one.tokens_per_s / now.tokens_per_s - 1
    words = "no gain" if abs(gain) < LEAST_GAIN_RATIO else f"{gain:+.1%} tokens/s"
    return format_seconds(one.step_s), words


def _ladder_rows(ladder: Sequence[SearchedAgain]) -> list[tuple[str, ...]]:
    longest_s = max((one.step_s for one in ladder if one.step_s is not None), default=1.0)
    rows: list[tuple[str, ...]] = []
    for one in ladder:
        step_s = one.step_s or 0.0
        line = bar({"#": step_s, " ": longest_s - step_s}, BAR_COLUMNS)
        rows.append((f"  {one.name}", f"[{line}]", _seconds(one.step_s), one.words))
    return rows


def _seconds(step_s: float | None) -> str:
    return "-" if step_s is None else format_seconds(step_s)


def explanation_json(explained: Explanation) -> dict[str, object]:
    """Sentences on what binds, and each further search: seconds per step, null where none fits."""
    return asdict(explained)


def explanation_pictures(explained: Explanation) -> tuple[Picture, ...]:
    """The ladder and the marginal values as bars."""
    now = explained.now
    ladder = [one for one in explained.ladder if one.step_s is not None]
    more = [now, *(one for one in explained.marginals if one.step_s is not None)]
    return (
        Picture(
            name="ladder",
            title="What each part of the search is worth",
            caption="The step of the fastest plan of ever larger spaces.",
            x_label="step [s]",
            row_names=tuple(one.name for one in ladder),
            shapes=tuple(
                row_rect(row, (0.0, one.step_s or 0.0), "fastest plan", _bar_words(one))
                for row, one in enumerate(ladder)
            ),
        ),
        Picture(
            name="marginal",
            title="What more would bring",
            caption="Tokens per second of the fastest plan with a little more of one thing.",
            x_label="tokens per second",
            row_names=tuple(one.name for one in more),
            shapes=tuple(
                row_rect(row, (0.0, one.tokens_per_s), "fastest plan", _bar_words(one))
                for row, one in enumerate(more)
            ),
        ),
    )


def _bar_words(one: SearchedAgain) -> str:
    speed = f"{format_count(one.tokens_per_s)} tokens/s"
    return f"{one.name}: {_seconds(one.step_s)} per step, {speed}, {one.words}"
