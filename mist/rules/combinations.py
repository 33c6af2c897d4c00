"""What may be combined with what: predicates over strategy columns, each with its message.

The search masks candidates with these rules, `mist check` and later execution refuse with them: so
nothing that cannot be run is ever planned. Columns: tp, dp, micro_batch, zero, dp_replicate,
num_stages, num_micro_batches, schedule, chunks, and the offload ratios weights, grads, optimizer,
activations; arrays or single values.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.model.summary import ModelFacts
from mist.plans.search_space import CHECKPOINTS
from mist.plans.workload import MemoryLevel, ScheduleKind, Workload
from mist.platform import Platform, Runtime

Columns = Mapping[str, ArrayLike]
Domain = Callable[[Columns], Mapping[str, NDArray[np.float64]]]
Mask = NDArray[np.bool_]
Arrays = Mapping[str, NDArray[Any]]

TAKES_TURNS: Final = (ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE)
"""Schedules that run chunks in turn, or split the backward pass: ranks of stages are connected one
to one (torch.distributed.pipelining), so stages have the same dp and tp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: where it holds, and what to say where it does not (format fields: the columns)."""

    name: str
    holds: Callable[[Arrays], ArrayLike]
    message: str

    def mask(self, columns: Columns) -> Mask:
        """True where the rule holds, in the broadcast shape of the columns."""
        arrays = {name: np.asarray(value) for name, value in columns.items()}
        shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
        return np.broadcast_to(np.asarray(self.holds(arrays), dtype=np.bool_), shape)


def rules_for(
    facts: ModelFacts, platform: Platform, workload: Workload, domain: Domain
) -> tuple[Rule, ...]:
    """Every rule of a model on a platform under a workload."""
    return (
        *knob_rules(platform.runtime),
        *_tp_rules(facts, platform, workload),
        *_batch_rules(facts, platform, workload),
        *_schedule_rules(facts, platform.runtime),
        *_copy_rules(platform),
        *_domain_rules(facts, workload, domain),
    )


def broken(rules: tuple[Rule, ...], columns: Columns) -> Iterator[str]:
    """The messages of the rules that one layout (scalar columns) breaks."""
    for rule in rules:
        if not rule.mask(columns).all():
            yield rule.message.format(**columns)


def knob_rules(runtime: Runtime) -> Iterator[Rule]:
    """What a runtime has of each knob that a strategy sets, whatever the model and the cluster."""
    knobs, name = runtime.knobs, f"runtime {runtime.name}"
    yield Rule(
        name="zero-known",
        holds=lambda c: np.isin(c["zero"], knobs.zero_levels),
        message=f"zero {{zero}}: {name} has zero {_listed(knobs.zero_levels)}.",
    )
    yield Rule(
        name="tp-known",
        holds=lambda c: (c["tp"] == 1) | knobs.tensor_parallel,
        message=f"tp {{tp}}: {name} has no tensor parallelism; use tp 1.",
    )
    yield Rule(
        name="dp-known",
        holds=lambda c: (c["dp"] == 1) | knobs.data_parallel,
        message=f"dp {{dp}}: {name} has no data parallelism; use dp 1.",
    )
    yield Rule(
        name="pp-known",
        holds=lambda c: (c["num_stages"] == 1) | bool(knobs.schedules),
        message=f"pp {{num_stages}}: {name} has no pipelines; use pp 1.",
    )
    yield Rule(
        name="schedule-known",
        holds=lambda c: (
            np.isin(c["schedule"], [kind.value for kind in knobs.schedules])
            | (c["num_stages"] == 1) & (c["schedule"] == ScheduleKind.ONE_F_ONE_B)
        ),
        message=f"schedule {{schedule}}: {name} has {_listed(knobs.schedules) or 'no pipelines'}.",
    )
    yield Rule(
        name="copies-known",
        holds=lambda c: (c["dp_replicate"] == 1) | knobs.copies,
        message="dp_replicate {dp_replicate}: copies of the states are predicted of FSDP2 only, "
        f"not of {name}; use dp_replicate 1.",
    )
    yield from _offload_rules(runtime)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def broken_levels(runtime: Runtime, levels: Iterable[MemoryLevel]) -> Iterator[str]:
    """What a runtime has not of the memory levels that the layers of one stage have."""
    used, own = set(levels), runtime.levels
    words = {word: level for word, level in CHECKPOINTS.items() if level in used}
    for word, level in words.items():
        if level not in own:
            known = _listed(word for word, level in CHECKPOINTS.items() if level in own)
            yield f"checkpoint {word}: runtime {runtime.name} has {known}."
    if len(words) > 1 and not runtime.knobs.recomputes_some:
        yield (
            f"checkpoint {' and '.join(words)} in one stage: runtime {runtime.name} does the same "
            "with all layers of a stage."
        )
    elif not may_mix(runtime, used):
        yield f"runtime {runtime.name} makes all layers of a stage selective, or none."


def out_of_domain(domain: Domain, seq_len: int) -> tuple[str, ...]:
    """The relations of the trace that no small micro-batch satisfies at this sequence length."""
    held = domain({"b": np.arange(1, 17), "s": seq_len, "t": 1})
    return tuple(relation for relation, holds in held.items() if not holds.any())


def _domain_rules(facts: ModelFacts, workload: Workload, domain: Domain) -> Iterator[Rule]:
    """Relations in b, s and t under which the traced expressions hold."""
    for relation in domain({"b": 1, "s": workload.seq_len, "t": 1}):
        yield Rule(
            name=f"domain-{relation}",
            holds=partial(_in_domain, domain, relation, workload.seq_len),
            message=f"the costs of {facts.name} were traced for {relation} only "
            "(b micro-batch, s sequence, t tp).",
        )


def _in_domain(domain: Domain, relation: str, seq_len: int, columns: Arrays) -> ArrayLike:
    return domain({"b": columns["micro_batch"], "s": seq_len, "t": columns["tp"]})[relation] > 0


def _tp_rules(facts: ModelFacts, platform: Platform, workload: Workload) -> Iterator[Rule]:
    per_node, seq_len = platform.gpus_per_node, workload.seq_len
    yield Rule(
        name="tp-in-node",
        holds=lambda c: (c["tp"] <= per_node) & (per_node % c["tp"] == 0),
        message=f"tp {{tp}} does not divide the {per_node} GPUs per node of "
        f"{platform.cluster.name}.",
    )
    yield from limit_rules(facts)
    if platform.runtime.name == "torch":
        yield from division_rules(facts)
    most = platform.runtime.knobs.most_zero_with_tp
    if most < 3:
        yield Rule(
            name="tp-with-zero",
            holds=lambda c: (c["tp"] == 1) | (c["zero"] <= most),
            message=f"tp {{tp}} with ZeRO-{{zero}}: runtime {platform.runtime.name} divides "
            f"tensors up to ZeRO-{most} only.",
        )
    if platform.runtime.knobs.sequence_parallel:
        yield Rule(
            name="tp-divides-sequence",
            holds=lambda c: seq_len % c["tp"] == 0,
            message=f"tp {{tp}} does not divide the sequence of {seq_len} tokens, "
            f"which runtime {platform.runtime.name} shards with it.",
        )


def division_rules(facts: ModelFacts) -> Iterator[Rule]:
    """What `mist apply` can divide."""
    if facts.undivided is not None:
        yield Rule(
            name="tp-divides-model",
            holds=lambda c: c["tp"] == 1,
            message=f"tp {{tp}}: mist apply cannot divide {facts.name}: {facts.undivided}; "
            "use tp 1",
        )


def limit_rules(facts: ModelFacts) -> Iterator[Rule]:
    """What the model itself can be divided by."""
    if facts.tp_limits is None:
        yield Rule(
            name="tp-rules-known",
            holds=lambda c: c["tp"] == 1,
            message=f"tp {{tp}}: no tensor-parallel rules are known for {facts.name}; "
            "give the model a `tp_plan`, or use --tp 1.",
        )
    for limit in facts.tp_limits or ():
        yield Rule(
            name=f"tp-divides-{limit.label}",
            holds=lambda c, size=limit.size: size % c["tp"] == 0,  # type: ignore[misc]
            message=f"tp {{tp}} does not divide the {limit.size} {limit.label} of {facts.name}.",
        )


def _batch_rules(facts: ModelFacts, platform: Platform, workload: Workload) -> Iterator[Rule]:
    batch = workload.global_batch
    yield Rule(
        name="batch-factors",
        holds=lambda c: c["dp"] * c["micro_batch"] * c["num_micro_batches"] == batch,
        message="dp {dp} * micro-batch {micro_batch} * {num_micro_batches} micro-batches "
        f"is not the global batch of {batch}.",
    )
    yield Rule(
        name="enough-micro-batches",
        holds=lambda c: c["num_micro_batches"] >= c["num_stages"],
        message="{num_micro_batches} micro-batches cannot fill {num_stages} pipeline stages: "
        "1F1B needs at least one for each.",
    )
    yield Rule(
        name="enough-layers",
        holds=lambda c: c["num_stages"] <= facts.num_layers,
        message=f"pp {{num_stages}} stages, but {facts.name} has {facts.num_layers} layers.",
    )
    if not facts.sequential:
        yield Rule(
            name="layers-in-a-row",
            holds=lambda c: c["num_stages"] == 1,
            message=f"pp {{num_stages}}: layers of {facts.name} exchange tensors with layers that "
            "are not their neighbours (skip connections); it runs on one pipeline stage only.",
        )
    yield Rule(
        name="stage-fills-nodes",
        holds=lambda c: _aligned(c["dp"] * c["tp"], platform.gpus_per_node),
        message="{dp} * {tp} ranks per stage neither divide nor fill the "
        f"{platform.gpus_per_node} GPUs of a node.",
    )


def _aligned(ranks: NDArray[np.int64], per_node: int) -> Mask:
    return np.asarray((ranks % per_node == 0) | (per_node % ranks == 0), dtype=np.bool_)


def _schedule_rules(facts: ModelFacts, runtime: Runtime) -> Iterator[Rule]:
    """What pipelines need of their schedule."""
    yield Rule(
        name="interleaved-has-stages",
        holds=lambda c: (c["schedule"] != ScheduleKind.INTERLEAVED) | (c["num_stages"] > 1),
        message="schedule interleaved needs at least 2 stages. Use 1f1b for one.",
    )
    yield Rule(
        name="chunks-have-layers",
        holds=lambda c: (c["chunks"] == 1) | (c["num_stages"] * c["chunks"] <= facts.num_layers),
        message=f"{{num_stages}} stages of {{chunks}} chunks, but {facts.name} has "
        f"{facts.num_layers} layers.",
    )
    yield Rule(
        name="whole-rounds",
        holds=lambda c: ~_takes_turns(c) | (c["num_micro_batches"] % _rounds(c) == 0),
        message="schedule {schedule} runs micro-batches in rounds of {num_stages}: "
        "{num_micro_batches} are no whole number of them.",
    )
    if runtime.knobs.fills_rounds:
        yield Rule(
            name="full-rounds",
            holds=lambda c: (
                (c["schedule"] != ScheduleKind.INTERLEAVED)
                | (c["num_micro_batches"] % c["num_stages"] == 0)
            ),
            message=f"runtime {runtime.name} interleaves multiples of {{num_stages}} micro-batches "
            "on {num_stages} stages: {num_micro_batches} is none.",
        )
    yield Rule(
        name="zero-bubble-keeps-parameters",
        holds=lambda c: (c["schedule"] != ScheduleKind.ZERO_BUBBLE) | (c["zero"] < 3),
        message="schedule zero-bubble with ZeRO-3 computes wrong gradients without an error "
        "(parameters are gone when the weight gradients run). Use ZeRO-2, or 1f1b.",
    )
    if runtime.offloads("grads"):
        yield Rule(
            name="zero-bubble-keeps-gradients",
            holds=lambda c: (c["schedule"] != ScheduleKind.ZERO_BUBBLE) | (c["grads"] == 0),
            message="schedule zero-bubble reduces gradients once a step, and until then all of "
            "them are on the device. Use 1f1b, or offload no weights and grads.",
        )
    if runtime.offloads("activations"):
        yield Rule(
            name="zero-bubble-keeps-activations",
            holds=lambda c: (c["schedule"] != ScheduleKind.ZERO_BUBBLE) | (c["activations"] == 0),
            message="schedule zero-bubble with offloaded activations holds those of all "
            "micro-batches (its split backward pass keeps what it fetches). Use 1f1b, or offload "
            "none.",
        )


def divides_ends(columns: Columns) -> tuple[NDArray[np.int64], ...]:
    """What decides which part of a weight each rank of a stage has: dp, dp_replicate, tp, ZeRO-0.

    Where embedding and head are one matrix, gradients of the first and the last stage are summed
    rank by rank: both stages must have the same.
    """
    arrays = {name: np.asarray(columns[name]) for name in ("dp", "dp_replicate", "tp", "zero")}
    unsharded = (arrays["zero"] == 0).astype(np.int64)
    dp, copies, tp, _ = np.broadcast_arrays(*arrays.values())
    return dp, copies, tp, unsharded


LEVEL_RULES: Final = (
    # What selective layers keep is kept by torch's checkpointing, which hooks of saved tensors do
    # not see.
    Rule(
        name="selective-stays",
        holds=lambda c: (c["level"] != MemoryLevel.SELECTIVE) | (c["activations"] == 0),
        message="what selective layers keep stays on the device; offload no activations, or use "
        "checkpoint none or full",
    ),
    Rule(
        name="zero-bubble-recomputes-nothing",
        holds=lambda c: (
            (c["level"] == MemoryLevel.NONE) | (c["schedule"] != ScheduleKind.ZERO_BUBBLE)
        ),
        message="zero-bubble splits the backward pass: torch runs a selective layer backward once "
        "only, and a full one forward again for each of its weights; use checkpoint none, or 1f1b",
    ),
)
"""What layers at a memory `level` may be combined with: `activations` offloaded, `schedule`."""


def may_have(level: MemoryLevel, columns: Columns) -> Mask:
    """Where stages may have layers at a level."""
    values = {name: columns[name] for name in ("activations", "schedule")}
    masks = [rule.mask(values | {"level": level.value}) for rule in LEVEL_RULES]
    return np.asarray(np.logical_and.reduce(masks))


def broken_by_levels(levels: Iterable[MemoryLevel], columns: Columns) -> Iterator[str]:
    """The messages of the level rules that one stage breaks."""
    values = {name: columns[name] for name in ("activations", "schedule")}
    for level in dict.fromkeys(levels):
        yield from broken(LEVEL_RULES, values | {"level": level.value})


def broken_between(
    facts: ModelFacts | None, schedule: ScheduleKind, stages: Sequence[Columns]
) -> Iterator[str]:
    """The messages of what the stages of one pipeline break together.

    `stages`: dp, dp_replicate, tp and zero of each, single values. `facts`: None where the model is
    not known yet.
    """
    grids = sorted({(int(str(own["dp"])), int(str(own["tp"]))) for own in stages})
    if schedule in TAKES_TURNS and len(grids) > 1:
        found = " and ".join(f"dp {dp} tp {tp}" for dp, tp in grids)
        yield (
            f"{schedule} needs the same dp and tp in every stage, found {found}; use 1f1b or gpipe"
        )
    if facts is not None and facts.tied and divides_ends(stages[0]) != divides_ends(stages[-1]):
        yield (
            f"{facts.name} ties its embedding to its head, so the first and the last stage must "
            "agree in dp, dp_replicate, tp, and in whether zero is 0"
        )


def _takes_turns(columns: Arrays) -> Mask:
    return np.isin(columns["schedule"], [kind.value for kind in TAKES_TURNS])


def _rounds(columns: Arrays) -> NDArray[np.int64]:
    return np.asarray(np.maximum(columns["num_micro_batches"] // columns["num_stages"], 1))


def _offload_rules(runtime: Runtime) -> Iterator[Rule]:
    """What a runtime can keep in host memory, and from which ZeRO level on."""
    for name in ("weights", "grads", "optimizer"):
        hosted = getattr(runtime.offload, name) if runtime.offload else None
        least = hosted.offered_from if hosted else 4
        needs = f"needs ZeRO-{least} or more" if hosted else "is not possible"
        yield Rule(
            name=f"offload-{name}",
            holds=lambda c, name=name, least=least: (c[name] == 0) | (c["zero"] >= least),  # type: ignore[misc]
            message=f"offloading {name} {needs} under runtime {runtime.name}, "
            f"found ratio {{{name}:g}} at ZeRO-{{zero}}.",
        )
    offers = runtime.offloads("activations")
    yield Rule(
        name="offload-activations",
        holds=lambda c: (c["activations"] == 0) | offers,
        message=f"offloading activations is not possible under runtime {runtime.name}.",
    )
    yield from _share_rules(runtime)
    by_layer = runtime.offload is not None and runtime.offload.by_layer
    yield Rule(
        name="offload-by-layer",
        holds=lambda c: (c["weights"] == c["grads"]) | (not by_layer),
        message=f"runtime {runtime.name} offloads weights and gradients of a layer together: "
        "their ratios are {weights:g} and {grads:g}.",
    )


def _share_rules(runtime: Runtime) -> Iterator[Rule]:
    """Of which states a runtime offloads a share, and what it offloads only with others."""
    shares = runtime.knobs.partial_offload
    for name in ("weights", "grads", "optimizer") if shares is not None else ():
        start = shares.get(name, 4) if shares else 4
        needs = f" below ZeRO-{start}" if start <= 3 else ""
        yield Rule(
            name=f"offload-whole-{name}",
            holds=lambda c, name=name, start=start: (  # type: ignore[misc]
                np.isin(c[name], (0.0, 1.0)) | (c["zero"] >= start)
            ),
            message=f"runtime {runtime.name} offloads all {name} or none{needs}, "
            f"found ratio {{{name}:g}} at ZeRO-{{zero}}.",
        )
    if runtime.knobs.weights_with_optimizer:
        yield Rule(
            name="offload-optimizer-first",
            holds=lambda c: (c["weights"] == 0) | (c["optimizer"] > 0),
            message=f"runtime {runtime.name} offloads weights only where the optimizer is "
            "offloaded too.",
        )


def may_mix(runtime: Runtime, levels: Collection[MemoryLevel]) -> bool:
    """Whether layers of one stage may have these memory levels."""
    selective = MemoryLevel.SELECTIVE in levels and len(set(levels)) > 1
    return runtime.knobs.mixes_selective or not selective


def _copy_rules(platform: Platform) -> Iterator[Rule]:
    """Where the states that ZeRO divides may have copies."""
    per_node = platform.gpus_per_node
    yield Rule(
        name="copies-divide-dp",
        holds=lambda c: c["dp"] % c["dp_replicate"] == 0,
        message="dp_replicate {dp_replicate} does not divide dp {dp}.",
    )
    yield Rule(
        name="copies-of-parts",
        holds=lambda c: (c["dp_replicate"] == 1) | (c["zero"] > 0) & (c["dp_replicate"] < c["dp"]),
        message="dp_replicate {dp_replicate} of dp {dp} at ZeRO-{zero}: states that have copies "
        "are also divided; use ZeRO-1 or more, and less than dp.",
    )
    yield Rule(
        name="copies-fill-nodes",
        holds=lambda c: (c["dp_replicate"] == 1) | _aligned(_copy_ranks(c), per_node),
        message="dp {dp} * tp {tp} in {dp_replicate} copies: ranks of one copy neither divide nor "
        f"fill the {per_node} GPUs of a node.",
    )
    yield Rule(
        name="copies-stay",
        holds=lambda c: (c["dp_replicate"] == 1) | (c["weights"] == 0) & (c["grads"] == 0),
        message="dp_replicate {dp_replicate}: gradients that wait for their sum over copies of the "
        "states stay on the device; offload no weights and grads.",
    )


def _copy_ranks(columns: Arrays) -> NDArray[np.int64]:
    return np.asarray(np.maximum(columns["dp"] // columns["dp_replicate"], 1) * columns["tp"])
