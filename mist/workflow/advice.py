"""What would help where a layout does not fit, or could be faster: changes that were judged.

Every change is a layout that the rule book allows and whose estimate was made: no advice is a
guess. Of a layout written by hand, in this order: one change; two changes, where no single one
helps; another layout on these GPUs; more GPUs. Of a search that finds nothing: more GPUs, or a
shorter sequence, and what lies outside of what the user narrowed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import process_time
from typing import TYPE_CHECKING, Final

from mist.errors import Infeasible, InputError
from mist.pareto.layouts import PricedLayout, plain_layout
from mist.pareto.strategies import priced
from mist.plans.breakdown import layout_words, short_layout
from mist.plans.host_memory import HostNeed
from mist.plans.knobs import TYPED_KNOBS
from mist.plans.plan import NOTHING_OFFLOADED, Estimate, Layout, Limits, PricedStages
from mist.plans.search_space import CHECKPOINTS, SearchSpace
from mist.search.state_room import state_room
from mist.search.tune import smallest_peak, tune
from mist.symbolic.estimate import estimate, priced_stages
from mist.symbolic.job import Job
from mist.symbolic.load_programs import quiet
from mist.symbolic.program import ModelPrograms
from mist.units import format_bytes, format_seconds
from mist.workflow.request import Question, host_need, job_of, limits_of, prepare

if TYPE_CHECKING:
    from mist.workflow.checking import Checked, HandLayout

MOST_GPUS_SUGGESTED: Final = 4096
LEAST_SEQ_LEN: Final = 128
MOST_SUGGESTED: Final = 3
LEAST_GAIN_RATIO: Final = 0.01  # of a step: less is no reason to change a layout
MOST_SEARCH_S: Final = 20.0  # processor time: advice is worth less than the answer itself

Changes = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A changed layout that fits, its prediction, and the options that change."""

    made: Layout
    judged: Estimate
    changes: Changes

    @property
    def step_s(self) -> float:
        """Predicted."""
        return self.judged.step_s

    @property
    def peak_bytes(self) -> int:
        """Of the fullest device."""
        return max(stage.peak_bytes for stage in self.judged.stages)

    @property
    def gain_words(self) -> str:
        """What it brings."""
        return f"{format_seconds(self.step_s)} per step, peak {format_bytes(self.peak_bytes)}"

    @property
    def words(self) -> str:
        """The options, and what they bring."""
        return f"{' '.join(self.changes)}: {self.gain_words}"


Make = Callable[[Job, "HandLayout"], Layout]
"""Makes a layout written by hand whole. Raises InputError naming every rule that it breaks."""


def suggestions(
    question: Question, job: Job, layout: "HandLayout", checked: "Checked", make: Make
) -> Iterator[Remedy | str]:
    """What makes a layout fit or, if it fits, faster; the fastest three."""
    one = list(_changed(job, layout, ()))
    helpful = _judged(job, one, checked, make)
    if not helpful and not checked.fits:
        two = [each for changes, changed in one for each in _changed(job, changed, changes)]
        helpful = _judged(job, two, checked, make)
    yield from sorted(helpful, key=lambda judged: (judged.step_s, judged.changes))
    if checked.margin_bytes >= 0 and not checked.host.fits:
        yield f"{checked.host.fix}, if the nodes have it"
    elif not helpful and not checked.fits:
        yield from _other_layouts(question, job, checked.limits)


def _judged(
    job: Job,
    candidates: list[tuple[Changes, "HandLayout"]],
    checked: "Checked",
    make: Make,
) -> list[Remedy]:
    """The fastest few of the candidates that fit and, where the layout itself fits, are faster."""
    step_s, found, known = checked.plan.estimate.step_s, [], set()
    for changes, changed in candidates:
        if changed in known:  # the same two changes in the other order
            continue
        known.add(changed)
        try:
            made = make(job, changed)
        except InputError:
            continue
        after = priced_stages(job, made)
        # A gain that the printed digits do not show is no suggestion.
        faster = after.step_s < step_s and format_seconds(after.step_s) != format_seconds(step_s)
        if (faster or not checked.fits) and _fits(job, made, after, checked.limits):
            found.append((after.step_s, changes, made))
    fastest = sorted(found, key=lambda one: one[:2])[:MOST_SUGGESTED]
    return [
        Remedy(made=made, judged=estimate(job, made), changes=changes)
        for _, changes, made in fastest
    ]


def _fits(job: Job, made: Layout, judged: PricedStages, limits: Limits) -> bool:
    """Whether every stage fits the device, and what is offloaded the host."""
    peak_bytes = max(stage.peak_bytes for stage in judged.stages)
    return peak_bytes <= limits.device_bytes and host_need(job, made, judged, limits).fits


def _changed(
    job: Job, layout: "HandLayout", before: Changes
) -> Iterator[tuple[Changes, "HandLayout"]]:
    """The layouts one change away, of an option that was not changed before."""
    knobs = {change.partition(" ")[0] for change in before}
    for change, changed in _changes(job, layout):
        if change.partition(" ")[0] not in knobs or change.startswith("--offload"):
            yield (*before, change), changed


def _changes(job: Job, layout: "HandLayout") -> Iterator[tuple[str, "HandLayout"]]:
    for checkpoint in CHECKPOINTS:
        if checkpoint != layout.checkpoint:
            yield f"--checkpoint {checkpoint}", replace(layout, checkpoint=checkpoint)
    for zero in _other_levels(job, layout):
        changed = replace(layout, zero=zero)  # type: ignore[call-arg]  # a generated field
        yield f"--zero {zero}", changed
    # Numbers of each stage are of no other number of stages.
    fixed = "," in layout.checkpoint
    for knob in (each for each in TYPED_KNOBS if each.halves and (each.of_stage or not fixed)):
        for value in _doubled_and_halved(getattr(layout, knob.field)):
            split = layout.layers if knob.of_stage else ()
            changed = replace(layout, **{knob.field: value}, layers=split)  # type: ignore[arg-type]
            yield f"--{knob.word} {value}", changed
    yield from _offloads(job, layout)


def _offloads(job: Job, layout: "HandLayout") -> Iterator[tuple[str, "HandLayout"]]:
    """All of a state moved to the host or back; weights with their gradients where they go so."""
    offload = job.platform.runtime.offload
    together = ("weights", "grads") if offload and offload.by_layer else ("weights",)
    for names in (("optimizer",), ("activations",), together):
        ratio = 0.0 if getattr(layout.offload, names[0]) else 1.0
        moved = replace(layout.offload, **dict.fromkeys(names, ratio))
        words = " ".join(f"--offload {name}={ratio:g}" for name in names)
        yield words, replace(layout, offload=moved)


def _other_levels(job: Job, layout: "HandLayout") -> list[int]:
    """Other ZeRO levels; all are one where nothing is divided and nothing streams from the host."""
    if job.platform.num_gpus == layout.tp * layout.pp and layout.offload == NOTHING_OFFLOADED:
        return []
    return [zero for zero in range(4) if zero != layout.zero]


def _doubled_and_halved(value: int) -> Iterator[int]:
    yield 2 * value
    if value > 1:
        yield value // 2


def _other_layouts(question: Question, job: Job, limits: Limits) -> Iterator[str]:
    """Whether any layout fits on these GPUs; else on how many."""
    space = SearchSpace()
    if state_room(job, limits).fits:
        layout, host = smallest(job, space, limits)
        if host.fits and layout.peak_bytes <= limits.device_bytes:
            yield (
                f"mist plan: it fits on {question.num_gpus} GPUs "
                f"({layout_words(plain_layout(job, layout))})"
            )
            return
    end = process_time() + MOST_SEARCH_S
    num_gpus, last = _enough_gpus(job.programs, space, question, end)
    if num_gpus:
        yield f"mist plan --gpus {num_gpus}: the fewest that were found to hold it"
    elif seq_len := _short_enough(job.programs, space, question, end):
        yield f"mist plan --seq {seq_len}: no doubling of the GPUs up to {last} holds more"


def best_instead(question: Question, checked: "Checked") -> Iterator[str]:
    """The fastest plan of the same runtime and GPUs, or that none is faster by much."""
    job = prepare(question)
    end = process_time() + MOST_SEARCH_S
    try:
        best = tune(
            job,
            priced(SearchSpace(), job),
            limits=checked.limits,
            num_alternatives=0,
            progress=quiet,
            is_late=lambda: process_time() > end,
            is_over=lambda: process_time() > end,
            method="dp",
        ).best
    except (Infeasible, InputError):  # nothing fits, or nothing was found in time
        return
    ratio = checked.plan.estimate.step_s / best.step_s
    if checked.fits and ratio < 1 + LEAST_GAIN_RATIO:
        yield "mist plan: no layout of this runtime is predicted to be faster by more than 1 %"
        return
    yield (
        f"mist plan --runtime {question.runtime}: {format_seconds(best.step_s)} per step, "
        f"{ratio:.2f} times as fast ({short_layout(layout_words(plain_layout(job, best)))})"
    )


def smallest(
    job: Job, space: SearchSpace, limits: Limits, *, enough_bytes: float = 0.0
) -> tuple[PricedLayout, HostNeed]:
    """The layout that takes least of a device among those that can be loaded, if any can.

    One that takes no more than `enough_bytes` will do.
    """
    layout = smallest_peak(job, space, host_bytes=limits.host_bytes, enough_bytes=enough_bytes)
    host = host_of(job, layout, limits)
    if not host.fits:
        less = less_drawn(limits, host)
        layout = smallest_peak(job, space, host_bytes=less.host_bytes, enough_bytes=enough_bytes)
        host = host_of(job, layout, limits)
    return layout, host


def less_drawn(limits: Limits, host: HostNeed) -> Limits:
    """Limits that leave room for what each rank draws."""
    return replace(limits, host_bytes=max(limits.host_bytes - (host.drawn_bytes or 0), 0.0))


def host_of(job: Job, layout: PricedLayout, limits: Limits) -> HostNeed:
    """What a layout needs of the memory of a node."""
    plain = plain_layout(job, layout)
    return host_need(job, plain, priced_stages(job, plain), limits)


def what_fits(programs: ModelPrograms, space: SearchSpace, question: Question) -> str:
    """The least number of GPUs that was found to do; else the longest sequence.

    Doublings, and half a doubling less than the first that does. Also whether it fits these GPUs
    without what the user narrowed.
    """
    end = process_time() + MOST_SEARCH_S
    num_gpus, last = _enough_gpus(programs, space, question, end)
    if num_gpus:
        words = f"Try --gpus {num_gpus}."
    else:
        words = f"No doubling of the GPUs up to {last} fits."
        seq_len = _short_enough(programs, space, question, end)
        words += f" Try --seq {seq_len}." if seq_len else ""
    if space.restrictions and _something_fits(programs, SearchSpace(), question):
        narrowed = ", ".join(space.restrictions)
        words += f" Without what was narrowed ({narrowed}) it fits on {question.num_gpus}."
    return words


def _enough_gpus(
    programs: ModelPrograms, space: SearchSpace, question: Question, end: float
) -> tuple[int | None, int]:
    """The number of GPUs on which something fits, if any was found; and the last that was tried."""
    last = num_gpus = 2 * question.num_gpus
    while num_gpus <= MOST_GPUS_SUGGESTED and process_time() < end:
        last = num_gpus
        if _something_fits(programs, space, replace(question, num_gpus=num_gpus)):
            fewer = 3 * num_gpus // 4
            fits = _something_fits(programs, space, replace(question, num_gpus=fewer))
            return (fewer if fits else num_gpus), last
        num_gpus *= 2
    return None, last


def _short_enough(
    programs: ModelPrograms, space: SearchSpace, question: Question, end: float
) -> int | None:
    """The longest of the halved sequences of which something fits."""
    seq_len = job_of(question, programs).workload.seq_len // 2
    while seq_len >= LEAST_SEQ_LEN and process_time() < end:
        if _something_fits(programs, space, replace(question, seq_len=seq_len)):
            return seq_len
        seq_len //= 2
    return None


def _something_fits(programs: ModelPrograms, space: SearchSpace, question: Question) -> bool:
    try:
        job = job_of(question, programs)
        limits = limits_of(job, question)
        if not state_room(job, limits).fits:
            return False
        layout, host = smallest(job, priced(space, job), limits, enough_bytes=limits.device_bytes)
    except InputError:  # a number that fills no nodes, or that the global batch does not divide
        return False
    return host.fits and layout.peak_bytes <= limits.device_bytes
