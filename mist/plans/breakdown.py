"""Why one layout beats another: the parts of a step, and where they differ.

A step is G micro-batches of the slowest stage, the delta of its first and last one, and the time
that the stage waits for others (bubble and imbalance): these parts sum to the step.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Final

from mist.plans.plan import (
    DEFAULT_SCHEDULE,
    Estimate,
    Layout,
    Offload,
    PricedStages,
    StageEstimate,
    StagePlan,
)
from mist.plans.workload import HeadMode
from mist.units import format_bytes, format_seconds

ROUNDING_RATIO: Final = 1e-5  # of the step: estimates carry six digits
MOST_WORDS: Final = 8  # of a reason on the screen

PART_NAMES: Mapping[str, str] = {
    "compute": "compute",
    "tp": "tensor-parallel collectives",
    "recompute": "recomputation",
    "launch": "waiting for the host to launch kernels",
    "dp": "exposed data-parallel collectives",
    "offload": "exposed copies between GPU and host",
    "p2p": "transfers between stages",
    "delta": "first and last micro-batch, optimizer",
    "bubble": "pipeline bubble and imbalance",
}

SHORT_NAMES: Mapping[str, str] = {
    "compute": "compute",
    "tp": "tensor-parallel",
    "recompute": "recomputation",
    "launch": "kernel launches",
    "dp": "data-parallel",
    "offload": "host copies",
    "p2p": "between stages",
    "delta": "once per step",
    "bubble": "pipeline bubble",
}
"""The same where a line has little room; the first letters differ."""


def step_parts(estimate: Estimate | PricedStages, num_micro_batches: int) -> dict[str, float]:
    """Seconds of a step by part, seen from the slowest stage; they sum to step_s."""
    slowest = max(estimate.stages, key=lambda stage: stage.stable_s)
    parts: dict[str, float] = {
        part: num_micro_batches * s for part, s in slowest.time_parts_s.items()
    }
    parts["delta"] = slowest.delta_s
    parts["bubble"] = estimate.step_s - sum(parts.values())
    return parts


def losing_reason(loser: Mapping[str, float], winner: Mapping[str, float]) -> str:
    """Where a slower layout spends more, the two largest differences first; where it gains most."""
    noise_s = ROUNDING_RATIO * sum(winner.values())
    more = {part: loser[part] - winner[part] for part in winner}
    worst = sorted(more, key=lambda part: -more[part])[:2]
    words = [f"+{format_seconds(more[p])} {PART_NAMES[p]}" for p in worst if more[p] > noise_s]
    less = min(more, key=lambda part: more[part])
    gained = f", {format_seconds(more[less])} {PART_NAMES[less]}" if more[less] < -noise_s else ""
    return (" and ".join(words) or "equal within rounding") + gained


def short_reasons(reason: str) -> list[str]:
    """A reason for a line of little room, the longest version first: of 8 words, of one part.

    `reason`: as `losing_reason` says it, or a sentence, of which the first clause is taken.
    """
    names = {PART_NAMES[part]: SHORT_NAMES[part] for part in PART_NAMES}
    found = re.findall(rf"([+-][\d.]+ \w+) ({'|'.join(map(re.escape, names))})", reason)
    parts = [f"{time} {names[name]}" for time, name in found]
    if not parts:
        return [" ".join(re.split("[;,]", reason)[0].split()[:MOST_WORDS])]
    # The largest loss, and what is gained for it.
    versions = [f"{parts[0]}, {parts[-1]}"] if len(parts) > 1 else []
    return [words for words in (*versions, parts[0]) if len(words.split()) <= MOST_WORDS]


def layout_words(layout: Layout) -> str:
    """A layout in one line: "pp2 dp4 tp2 zero1 mb1 x32, 3+0 of 16 layers recomputed"."""
    stages, schedule = layout.stages, layout.schedule
    names: dict[str, list[int]] = {
        "dp": [stage.dp for stage in stages],
        "tp": [stage.tp for stage in stages],
        "zero": [stage.zero for stage in stages],
        "mb": [stage.micro_batch for stage in stages],
    }
    words = [f"pp{len(stages)}"]
    words += [f"{name}{_spread(values)}" for name, values in names.items()]
    full, layers = (
        _spread(counts) for counts in ([s.num_full for s in stages], [s.num_layers for s in stages])
    )
    if any(stage.dp_replicate > 1 for stage in stages):
        words.insert(2, f"replicate{_spread([stage.dp_replicate for stage in stages])}")
    line = f"{' '.join(words)} x{layout.num_micro_batches}, {full} of {layers} layers recomputed"
    for word in stages[0].num_partly:
        some = _spread([stage.num_partly[word] for stage in stages])
        line += f", {some} {word}" if some != "0" else ""
    if stages[-1].head != HeadMode.NONE:
        line += f", head {stages[-1].head}"
    if len(stages) > 1 and schedule != DEFAULT_SCHEDULE:
        line += f", {schedule.kind}" + (f" of {schedule.vpp} chunks" if schedule.vpp > 1 else "")
    return line + _offload_words(stages)


def short_layout(words: str) -> str:
    """A line of `layout_words` where there is little room: what is 0 and all shares are left out.

    "pp1 dp4 tp1 zero2 mb1 x16, 3 recomputed, offload".
    """
    line, _, offloaded = words.partition(", offloaded: ")
    strategy, *others = line.split(", ")
    short = [strategy]
    for other in others:
        count, _, rest = other.partition(" ")
        if rest.endswith("layers recomputed"):
            short += [] if count == "0" else [f"{count} recomputed"]
        else:
            short.append(f"{count} partly" if rest == "selectively" else other)
    return ", ".join([*short, *(["offload"] if offloaded else [])])


def _offload_words(stages: Sequence[StagePlan]) -> str:
    """What is offloaded, in per cent: ", offloaded: optimizer 50 %"."""
    words = []
    for item in fields(Offload):
        shares = [round(100 * getattr(stage.offload, item.name)) for stage in stages]
        if any(shares):
            words.append(f"{item.name} {_spread(shares)} %")
    return f", offloaded: {', '.join(words)}" if words else ""


def _spread(values: Sequence[int]) -> str:
    """One value where all are equal, else all of them; three and more in a row as "3*7"."""
    if len(set(values)) == 1:
        return str(values[0])
    runs = [(value, len(list(run))) for value, run in groupby(values)]
    words = (f"{n}*{value}" if n > 2 else "+".join([str(value)] * n) for value, n in runs)
    return "+".join(words)


def overflow(index: int, stage: StageEstimate, device: str, limit_bytes: float) -> str:
    """One stage that does not fit: what it needs, what there is, and the largest parts."""
    parts = sorted(stage.memory_parts_bytes.items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size > 0)
    return (
        f"stage {index} needs {format_bytes(stage.peak_bytes)} of the {format_bytes(limit_bytes)} "
        f"that a plan may use on {device} ({largest}); "
        f"{exceeded_words(stage.peak_bytes, stage.usable_bytes)}"
    )


def exceeded_words(peak_bytes: int, usable_bytes: int) -> str:
    """Whether a peak beyond the limit of plans exceeds the device itself, or its margin only."""
    room, usable = usable_bytes - peak_bytes, format_bytes(usable_bytes)
    if room < 0:
        return f"the card itself is exceeded: it has {usable} usable, {format_bytes(-room)} too few"
    # Rounded down, so that the peak is within what the margin leaves.
    margin_ratio = math.floor(100 * room / usable_bytes) / 100
    return (
        f"only the margin is exceeded: the card itself has {usable} usable, "
        f"{format_bytes(room)} to spare (--margin {margin_ratio:g} admits it)"
    )
