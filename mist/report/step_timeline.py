"""One training step pass by pass: when each stage works forward and backward, and what it awaits.

A rank runs its passes in the order of its schedule (`mist.plans.schedules`); a pass starts when the
rank is free and what it needs has come:

    forward  of chunk c, stage i     after that of the stage before (of the last one: chunk c - 1)
    backward of chunk c, stage i     after that of the stage behind (of the first one: chunk c + 1)
    weights  of chunk c, stage i     after its own backward pass, where the schedule splits it

The step ends with what happens once in it. This is the pipeline that the formula of the step time
sums up: where stages are alike, both give the same seconds.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from mist.plans.plan import Layout, Schedule
from mist.plans.schedules import SCHEDULES, chunks_held, round_size

PassKind = Literal["forward", "backward", "weights"]
MOST_PASSES: Final = 1200  # that a picture shows; middle micro-batches are alike


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePace:
    """Seconds of a stage: a micro-batch forward and backward by part, and what comes once a step.

    `weight_s`: of the backward pass, what computes gradients of weights.
    """

    forward_s: Mapping[str, float]
    backward_s: Mapping[str, float]
    weight_s: float
    once_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass of one micro-batch through a chunk of a stage, in s from the start of the step."""

    stage: int
    chunk: int
    micro_batch: int
    kind: PassKind
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The passes of `num_micro_batches`; `ends_s`: of each stage, with what comes once."""

    passes: tuple[Pass, ...]
    ends_s: tuple[float, ...]
    num_micro_batches: int

    @property
    def step_s(self) -> float:
        """When the last stage is done."""
        return max(self.ends_s)


_Turn = tuple[PassKind, int, int]


def timeline(layout: Layout, paces: Sequence[StagePace]) -> Timeline:
    """The passes of a step, of as many of its micro-batches as a picture shows."""
    num_stages, schedule = len(layout.stages), layout.schedule
    num_micro_batches = _shown(layout)
    work = _Work(schedule=schedule, paces=paces, free_s=[0.0] * num_stages)
    ranks = [
        deque(_turns(schedule, stage, num_stages, num_micro_batches)) for stage in range(num_stages)
    ]
    while any(ranks):
        ran = [work.run(stage, turns) for stage, turns in enumerate(ranks)]
        assert any(ran), "the passes of a schedule wait for each other"
    return Timeline(
        passes=tuple(work.passes),
        ends_s=tuple(s + pace.once_s for s, pace in zip(work.free_s, paces, strict=True)),
        num_micro_batches=num_micro_batches,
    )


@dataclass(slots=True, kw_only=True)
class _Work:
    """What ran so far: when each pass ended, and since when each rank is free."""

    schedule: Schedule
    paces: Sequence[StagePace]
    free_s: list[float]
    ends: dict[_Turn, float] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)

    def run(self, stage: int, turns: deque[_Turn]) -> bool:
        """Run the turns of a rank as far as what they need has come; whether any ran."""
        num_stages, before = len(self.paces), len(self.passes)
        while turns:
            kind, chunk, micro_batch = turns[0]
            place = chunk * num_stages + stage
            needs = _needs(kind, place, self.schedule.vpp * num_stages, micro_batch)
            if any(need not in self.ends for need in needs):
                break
            start_s = max([self.free_s[stage], *(self.ends[need] for need in needs)])
            end_s = start_s + _seconds(self.paces[stage], kind, self.schedule)
            self.ends[kind, place, micro_batch] = self.free_s[stage] = end_s
            self.passes.append(
                Pass(
                    stage=stage,
                    chunk=chunk,
                    micro_batch=micro_batch,
                    kind=kind,
                    start_s=start_s,
                    end_s=end_s,
                )
            )
            turns.popleft()
        return len(self.passes) > before


def _shown(layout: Layout) -> int:
    """Micro-batches that fit a picture, at least two rounds, in whole rounds."""
    num_stages = len(layout.stages)
    most = max(MOST_PASSES // (2 * num_stages * layout.schedule.vpp), 2 * num_stages)
    if layout.num_micro_batches <= most:
        return layout.num_micro_batches
    return most // num_stages * num_stages


def _turns(
    schedule: Schedule, stage: int, num_stages: int, num_micro_batches: int
) -> Iterator[_Turn]:
    """What a rank runs, in order: some forward, then one backward and one forward by turns."""
    row, chunks = SCHEDULES[schedule.kind], schedule.vpp
    counts = [np.asarray(n) for n in (stage, num_stages, num_micro_batches, chunks)]
    held = int(chunks_held(schedule.kind, *counts))
    # Gradients of weights that wait hold activations too: they came forward later.
    ahead = min(held - stage * row.splits_backward, num_micro_batches * chunks)
    size = int(round_size(counts[1], counts[2]))
    forward = list(_in_rounds(range(chunks), size, num_micro_batches))
    backward = list(_in_rounds(range(chunks - 1, -1, -1), size, num_micro_batches))
    for chunk, micro_batch in forward[:ahead]:
        yield "forward", chunk, micro_batch
    for done, (chunk, micro_batch) in enumerate(backward):
        yield "backward", chunk, micro_batch
        if row.splits_backward and done >= stage:
            yield "weights", *backward[done - stage]
        if ahead + done < len(forward):
            yield "forward", *forward[ahead + done]
    if row.splits_backward:
        for chunk, micro_batch in backward[max(len(backward) - stage, 0) :]:
            yield "weights", chunk, micro_batch


def _in_rounds(
    chunks: Sequence[int], size: int, num_micro_batches: int
) -> Iterator[tuple[int, int]]:
    """Each chunk runs `size` micro-batches, then the next one has its turn."""
    for first in range(0, num_micro_batches, size):
        for chunk in chunks:
            for micro_batch in range(first, min(first + size, num_micro_batches)):
                yield chunk, micro_batch


def _needs(kind: PassKind, place: int, num_places: int, micro_batch: int) -> list[_Turn]:
    """The passes before one; `place`: of the chunk among all of the model, in its order."""
    if kind == "weights":
        return [("backward", place, micro_batch)]
    if kind == "forward":
        return [("forward", place - 1, micro_batch)] if place else []
    behind: list[_Turn] = []
    if place + 1 < num_places:
        behind = [("backward", place + 1, micro_batch)]
    return [("forward", place, micro_batch), *behind]


def _seconds(pace: StagePace, kind: PassKind, schedule: Schedule) -> float:
    """Seconds of a pass: a chunk is a share of its stage."""
    splits = SCHEDULES[schedule.kind].splits_backward
    backward_s = sum(pace.backward_s.values()) - pace.weight_s * splits
    whole_s = {
        "forward": sum(pace.forward_s.values()),
        "backward": backward_s,
        "weights": pace.weight_s,
    }
    return whole_s[kind] / schedule.vpp
