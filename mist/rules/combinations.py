"""The rule book: what may be combined with what, each rule a row with its message.

The search masks candidates with these rows, `mist check` and `mist apply` refuse with them: so
nothing that cannot be run is ever planned. Rows of levels and of several stages: `levels`,
`between_stages`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.model.summary import ModelFacts, TpLimit
from mist.plans.knobs import AT_REST
from mist.plans.schedules import DEFAULT_KIND, kinds_that
from mist.plans.workload import HeadMode, Workload
from mist.platform import Platform, Runtime
from mist.rules.levels import SPLIT
from mist.rules.rule import Arrays, Columns, Mask, Rule, Scope, kept_by

Domain = Callable[[Columns], Mapping[str, NDArray[np.float64]]]

TAKES_TURNS: Final = kinds_that(lambda row: row.takes_turns)
OTHER_HEADS: Final = tuple(mode for mode in HeadMode if mode is not HeadMode.NONE)
CHUNKED: Final = kinds_that(lambda row: row.least_chunks > 1)

PREDICTED: Final = frozenset({Scope.SEARCH, Scope.PREDICT})
GIVEN: Final = frozenset({Scope.PREDICT, Scope.APPLY})

AXES_AT_REST: Final = tuple(
    Rule(
        name=f"{axis}-at-rest",
        field=axis,
        scope=GIVEN,
        holds=lambda c, axis=axis: c[axis] == 1,  # type: ignore[misc]
        message=f"{axis} {{{axis}}}: {words} parallelism is not predicted or run yet; use 1.",
    )
    for axis, words in (("cp", "context"), ("ep", "expert"))
)
"""What plan files can say and no search sets."""


HEAD_RULES: Final = (
    Rule(
        name="head-divides",
        field="head",
        holds=lambda c: (c["head"] == AT_REST["head"]) | (c["tp"] == 1),
        message="tp {tp}: a head that tensor parallelism divides keeps its part of all logits; use "
        "head none, or tp 1",
    ),
    Rule(
        name="head-splits-backward",
        field="head",
        holds=lambda c: (c["head"] == AT_REST["head"]) | ~np.isin(c["schedule"], SPLIT),
        message="{schedule} splits the backward pass, which a head without all logits runs at "
        f"once; use head none, or {DEFAULT_KIND}",
    ),
)
"""What a head that does not have all logits at once may be combined with."""


def rules_for(
    facts: ModelFacts, platform: Platform, workload: Workload, domain: Domain
) -> tuple[Rule, ...]:
    """Every rule of the search: of a model on a platform under a workload."""
    rules = (
        *_of_runtime(platform.runtime, workload),
        *_of_model(facts),
        *_of_cluster(platform),
        *_domain_rules(facts, workload, domain),
    )
    return kept_by(rules, Scope.SEARCH, platform.runtime.name)


def apply_rules(runtime: Runtime, workload: Workload, facts: ModelFacts | None) -> tuple[Rule, ...]:
    """Every rule of `mist apply`. `facts`: None where the model is not known yet."""
    rules = (
        *AXES_AT_REST,
        *_of_runtime(runtime, workload),
        *(_of_model(facts) if facts is not None else ()),
    )
    return kept_by(rules, Scope.APPLY, runtime.name)


def _of_runtime(runtime: Runtime, workload: Workload) -> Iterator[Rule]:
    yield from knob_rules(runtime)
    yield from _tp_rules(runtime, workload)
    yield from _batch_rules(workload)
    yield from _schedule_rules(runtime)
    yield from COPY_RULES
    yield from HEAD_RULES


def _of_model(facts: ModelFacts) -> Iterator[Rule]:
    yield from limit_rules(facts)
    yield from _division_rules(facts)
    yield from _layer_rules(facts)


def knob_rules(runtime: Runtime) -> Iterator[Rule]:
    """What a runtime has of each knob that a strategy sets, whatever the model and the cluster."""
    knobs, name = runtime.knobs, f"runtime {runtime.name}"
    yield Rule(
        name="zero-known",
        field="zero",
        holds=lambda c: np.isin(c["zero"], knobs.zero_levels),
        message=f"zero {{zero}}: {name} has zero {_listed(knobs.zero_levels)}.",
    )
    yield Rule(
        name="tp-known",
        field="tp",
        holds=lambda c: (c["tp"] == 1) | knobs.tensor_parallel,
        message=f"tp {{tp}}: {name} has no tensor parallelism; use tp 1.",
    )
    yield Rule(
        name="dp-known",
        field="dp",
        holds=lambda c: (c["dp"] == 1) | knobs.data_parallel,
        message=f"dp {{dp}}: {name} has no data parallelism; use dp 1.",
    )
    yield Rule(
        name="pp-known",
        field="plan.stages",
        holds=lambda c: (c["num_stages"] == 1) | bool(knobs.schedules),
        message=f"pp {{num_stages}}: {name} has no pipelines; use pp 1.",
    )
    yield Rule(
        name="schedule-known",
        field="plan.schedule.kind",
        holds=lambda c: (
            np.isin(c["schedule"], [kind.value for kind in knobs.schedules])
            | (c["num_stages"] == 1) & (c["schedule"] == DEFAULT_KIND)
        ),
        message=f"schedule {{schedule}}: {name} has {_listed(knobs.schedules) or 'no pipelines'}.",
    )
    yield Rule(
        name="copies-known",
        field="dp_replicate",
        holds=lambda c: (c["dp_replicate"] == 1) | knobs.copies,
        message="dp_replicate {dp_replicate}: copies of the states are predicted of FSDP2 only, "
        f"not of {name}; use dp_replicate 1.",
    )
    yield Rule(
        name="head-known",
        field="head",
        holds=lambda c: (c["head"] == AT_REST["head"]) | runtime.converts_layers,
        message=f"head {_listed(OTHER_HEADS)}: {name} runs the model's own; use head none.",
    )
    yield from _offload_rules(runtime)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def out_of_domain(domain: Domain, seq_len: int) -> tuple[str, ...]:
    """The relations of the trace that no small micro-batch satisfies at this sequence length."""
    held = domain({"b": np.arange(1, 17), "s": seq_len, "t": 1, "head": AT_REST["head"]})
    return tuple(relation for relation, holds in held.items() if not holds.any())


def _domain_rules(facts: ModelFacts, workload: Workload, domain: Domain) -> Iterator[Rule]:
    """Relations in b, s and t under which the traced expressions hold."""
    for relation in domain({"b": 1, "s": workload.seq_len, "t": 1, "head": AT_REST["head"]}):
        yield Rule(
            name=f"domain-{relation}",
            field="micro_batch",
            scope=PREDICTED,
            holds=partial(_in_domain, domain, relation, workload.seq_len),
            message=f"the costs of {facts.name} were traced for {relation} only "
            "(b micro-batch, s sequence, t tp).",
        )


def _in_domain(domain: Domain, relation: str, seq_len: int, columns: Arrays) -> ArrayLike:
    # A program returns floats: a relation that holds is 1.0.
    sizes: Columns = {
        **{"b": columns["micro_batch"], "s": seq_len},
        **{"t": columns["tp"], "head": columns["head"]},
    }
    return domain(sizes)[relation] > 0


def _tp_rules(runtime: Runtime, workload: Workload) -> Iterator[Rule]:
    """What a runtime asks of tensor parallelism."""
    most, seq_len = runtime.knobs.most_zero_with_tp, workload.seq_len
    if most < 3:
        yield Rule(
            name="tp-with-zero",
            field="zero",
            holds=lambda c: (c["tp"] == 1) | (c["zero"] <= most),
            message=f"tp {{tp}} with ZeRO-{{zero}}: runtime {runtime.name} divides "
            f"tensors up to ZeRO-{most} only.",
        )
    if runtime.knobs.sequence_parallel:
        yield Rule(
            name="tp-divides-sequence",
            field="sp",
            holds=lambda c: seq_len % c["tp"] == 0,
            message=f"tp {{tp}} does not divide the sequence of {seq_len} tokens, "
            f"which runtime {runtime.name} shards with it.",
        )


def limit_rules(facts: ModelFacts) -> Iterator[Rule]:
    """What the model itself can be divided by."""
    if facts.tp_limits is None:
        yield Rule(
            name="tp-rules-known",
            field="tp",
            holds=lambda c: c["tp"] == 1,
            message=f"tp {{tp}}: no tensor-parallel rules are known for {facts.name}; "
            "give the model a `tp_plan`, or use --tp 1.",
        )
    for limit in facts.tp_limits or ():
        yield divides(limit, facts.name)


def divides(limit: TpLimit, name: str) -> Rule:
    """The rule of one size of a model."""
    return Rule(
        name=f"tp-divides-{limit.label}",
        field="tp",
        holds=lambda c: limit.size % c["tp"] == 0,
        message=f"tp {{tp}} does not divide the {limit.size} {limit.label} of {name}.",
    )


def _batch_rules(workload: Workload) -> Iterator[Rule]:
    batch = workload.global_batch
    yield Rule(
        name="batch-factors",
        field="plan.num_micro_batches",
        holds=lambda c: c["dp"] * c["micro_batch"] * c["num_micro_batches"] == batch,
        message="dp {dp} * micro-batch {micro_batch} * {num_micro_batches} micro-batches "
        f"is not the global batch of {batch}.",
    )
    yield Rule(
        name="enough-micro-batches",
        field="plan.num_micro_batches",
        holds=lambda c: c["num_micro_batches"] >= c["num_stages"],
        message="{num_micro_batches} micro-batches cannot fill {num_stages} pipeline stages: "
        "use at least one for each (a smaller micro-batch, or fewer stages).",
    )


def _division_rules(facts: ModelFacts) -> Iterator[Rule]:
    """What `mist apply` can divide."""
    if facts.undivided is not None:
        yield Rule(
            name="tp-divides-model",
            field="tp",
            runtimes=frozenset({"torch"}),
            holds=lambda c: c["tp"] == 1,
            message=f"tp {{tp}}: mist apply cannot divide {facts.name}: {facts.undivided}; "
            "use tp 1.",
        )
    # Where layers are no chain at all another row says so, for every runtime.
    if facts.sequential and facts.unstaged is not None:
        yield Rule(
            name="stages-divide-model",
            field="plan.stages",
            runtimes=frozenset({"torch"}),
            holds=lambda c: c["num_stages"] == 1,
            message=f"pp {{num_stages}}: mist apply cannot divide {facts.name} over stages: "
            f"{facts.unstaged}; use pp 1.",
        )


def _layer_rules(facts: ModelFacts) -> Iterator[Rule]:
    """How the layers of a model can be divided over stages."""
    yield Rule(
        name="enough-layers",
        field="plan.stages",
        holds=lambda c: c["num_stages"] <= facts.num_layers,
        message=f"pp {{num_stages}} stages, but {facts.name} has {facts.num_layers} layers.",
    )
    yield Rule(
        name="chunks-have-layers",
        field="plan.schedule.vpp",
        holds=lambda c: (c["chunks"] == 1) | (c["num_stages"] * c["chunks"] <= facts.num_layers),
        message=f"{{num_stages}} stages of {{chunks}} chunks, but {facts.name} has "
        f"{facts.num_layers} layers.",
    )
    if not facts.sequential:
        yield Rule(
            name="layers-in-a-row",
            field="plan.stages",
            holds=lambda c: c["num_stages"] == 1,
            message=f"pp {{num_stages}}: layers of {facts.name} exchange tensors with layers that "
            "are not their neighbours (skip connections); it runs on one pipeline stage only.",
        )


def _of_cluster(platform: Platform) -> Iterator[Rule]:
    """Where ranks stand on a cluster: such groups have their collectives priced."""
    per_node = platform.gpus_per_node
    yield Rule(
        name="tp-in-node",
        field="tp",
        scope=PREDICTED,
        holds=lambda c: (c["tp"] <= per_node) & (per_node % c["tp"] == 0),
        message=f"tp {{tp}} does not divide the {per_node} GPUs per node of "
        f"{platform.cluster.name}.",
    )
    yield Rule(
        name="stage-fills-nodes",
        field="devices",
        scope=PREDICTED,
        holds=lambda c: _aligned(c["dp"] * c["tp"], per_node),
        message=f"{{dp}} * {{tp}} ranks per stage neither divide nor fill the {per_node} GPUs of "
        "a node.",
    )
    yield Rule(
        name="copies-fill-nodes",
        field="dp_replicate",
        scope=PREDICTED,
        holds=lambda c: (c["dp_replicate"] == 1) | _aligned(_copy_ranks(c), per_node),
        message="dp {dp} * tp {tp} in {dp_replicate} copies: ranks of one copy neither divide nor "
        f"fill the {per_node} GPUs of a node.",
    )


def _aligned(ranks: NDArray[np.int64], per_node: int) -> Mask:
    return np.asarray((ranks % per_node == 0) | (per_node % ranks == 0), dtype=np.bool_)


def _schedule_rules(runtime: Runtime) -> Iterator[Rule]:
    """What pipelines need of their schedule."""
    yield Rule(
        name="chunked-has-stages",
        field="plan.schedule.kind",
        holds=lambda c: ~np.isin(c["schedule"], CHUNKED) | (c["num_stages"] > 1),
        message=f"schedule {{schedule}} needs at least 2 stages. Use {DEFAULT_KIND} for one.",
    )
    yield Rule(
        name="whole-rounds",
        field="plan.num_micro_batches",
        holds=lambda c: ~_takes_turns(c) | (c["num_micro_batches"] % _rounds(c) == 0),
        message="schedule {schedule} runs micro-batches in rounds of {num_stages}: "
        "{num_micro_batches} are no whole number of them.",
    )
    if runtime.knobs.fills_rounds:
        yield Rule(
            name="full-rounds",
            field="plan.num_micro_batches",
            holds=lambda c: (
                ~np.isin(c["schedule"], CHUNKED) | (c["num_micro_batches"] % c["num_stages"] == 0)
            ),
            message=f"runtime {runtime.name} interleaves multiples of {{num_stages}} micro-batches "
            "on {num_stages} stages: {num_micro_batches} is none.",
        )
    yield Rule(
        name="split-backward-keeps-parameters",
        field="zero",
        holds=lambda c: ~np.isin(c["schedule"], SPLIT) | (c["zero"] < 3),
        message="schedule {schedule} with ZeRO-3 computes wrong gradients without an error "
        "(parameters are gone when the weight gradients run). Use ZeRO-2, or 1f1b.",
    )
    if runtime.offloads("grads"):
        yield Rule(
            name="split-backward-keeps-gradients",
            field="offload.grads",
            holds=lambda c: ~np.isin(c["schedule"], SPLIT) | (c["grads"] == 0),
            message="schedule {schedule} reduces gradients once a step, and until then all of "
            "them are on the device. Use 1f1b, or offload no weights and grads.",
        )
    if runtime.offloads("activations"):
        yield Rule(
            name="split-backward-keeps-activations",
            field="offload.activations",
            holds=lambda c: ~np.isin(c["schedule"], SPLIT) | (c["activations"] == 0),
            message="schedule {schedule} with offloaded activations holds those of all "
            "micro-batches (its split backward pass keeps what it fetches). Use 1f1b, or offload "
            "none.",
        )


def _takes_turns(columns: Arrays) -> Mask:
    return np.isin(columns["schedule"], TAKES_TURNS)


def _rounds(columns: Arrays) -> NDArray[np.int64]:
    # Too few micro-batches break a rule of their own; here they must not divide by zero.
    return np.asarray(np.maximum(columns["num_micro_batches"] // columns["num_stages"], 1))


def _offload_rules(runtime: Runtime) -> Iterator[Rule]:
    """What a runtime can keep in host memory, and from which ZeRO level on."""
    for name in ("weights", "grads", "optimizer"):
        hosted = runtime.hosted(name)
        # No ZeRO level reaches 4: what the runtime never offloads breaks the rule at every level.
        least = hosted.offered_from if hosted else 4
        needs = f"needs ZeRO-{least} or more" if hosted else "is not possible"
        yield Rule(
            name=f"offload-{name}",
            field=f"offload.{name}",
            holds=lambda c, name=name, least=least: (c[name] == 0) | (c["zero"] >= least),  # type: ignore[misc]
            message=f"offloading {name} {needs} under runtime {runtime.name}, "
            f"found ratio {{{name}:g}} at ZeRO-{{zero}}.",
        )
    offers = runtime.offloads("activations")
    yield Rule(
        name="offload-activations",
        field="offload.activations",
        holds=lambda c: (c["activations"] == 0) | offers,
        message=f"offloading activations is not possible under runtime {runtime.name}.",
    )
    yield from _share_rules(runtime)
    by_layer = runtime.offload is not None and runtime.offload.by_layer
    yield Rule(
        name="offload-by-layer",
        field="offload",
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
            field=f"offload.{name}",
            holds=lambda c, name=name, start=start: (  # type: ignore[misc]
                np.isin(c[name], (0.0, 1.0)) | (c["zero"] >= start)
            ),
            message=f"runtime {runtime.name} offloads all {name} or none{needs}, "
            f"found ratio {{{name}:g}} at ZeRO-{{zero}}.",
        )
    if runtime.knobs.weights_with_optimizer:
        yield Rule(
            name="offload-optimizer-first",
            field="offload.weights",
            holds=lambda c: (c["weights"] == 0) | (c["optimizer"] > 0),
            message=f"runtime {runtime.name} offloads weights only where the optimizer is "
            "offloaded too.",
        )


COPY_RULES: Final = (
    Rule(
        name="copies-divide-dp",
        field="dp_replicate",
        holds=lambda c: c["dp"] % c["dp_replicate"] == 0,
        message="dp_replicate {dp_replicate} does not divide dp {dp}.",
    ),
    Rule(
        name="copies-of-parts",
        field="dp_replicate",
        holds=lambda c: (c["dp_replicate"] == 1) | (c["zero"] > 0) & (c["dp_replicate"] < c["dp"]),
        message="dp_replicate {dp_replicate} of dp {dp} at ZeRO-{zero}: states that have copies "
        "are also divided; use ZeRO-1 or more, and less than dp.",
    ),
    Rule(
        name="copies-stay",
        field="dp_replicate",
        holds=lambda c: (c["dp_replicate"] == 1) | (c["weights"] == 0) & (c["grads"] == 0),
        message="dp_replicate {dp_replicate}: gradients that wait for their sum over copies of the "
        "states stay on the device; offload no weights and grads, or use dp_replicate 1.",
    ),
)
"""Where the states that ZeRO divides may have copies (HSDP)."""


def _copy_ranks(columns: Arrays) -> NDArray[np.int64]:
    # More copies than ranks break a rule of their own; here they must not divide by zero.
    return np.asarray(np.maximum(columns["dp"] // columns["dp_replicate"], 1) * columns["tp"])
