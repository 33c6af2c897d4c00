"""What of a plan `mist apply` cannot run, said before any rank starts. Torch-free.

The rules are those of the rule book. Here is what depends on the machine, on the number of ranks,
and on whether this is the model that the plan was made for.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from mist.errors import Fault, InputError, PlanError
from mist.model.summary import ModelFacts, difference_words
from mist.plans.plan import Plan, fullest_host_bytes
from mist.plans.workload import Precision
from mist.platform import Runtime
from mist.platform.profiles import load_runtime
from mist.platform.states import sum_states
from mist.rules.between_stages import broken_between
from mist.rules.combinations import apply_rules
from mist.rules.levels import level_faults
from mist.rules.rule import layout_columns, stage_faults
from mist.units import GIB

RUNTIME: Final = "torch"


def as_applied(runtime: Runtime, facts: ModelFacts) -> Runtime:
    """The runtime as it trains this model.

    `mist apply` leaves some sequences whole, and treats all calls of a shared layer alike.
    """
    knobs = runtime.knobs
    if runtime.name == RUNTIME and facts.whole_sequence is not None:
        knobs = replace(knobs, sequence_parallel=False)
    if runtime.name == RUNTIME and facts.calls_again:
        knobs = replace(knobs, recomputes_some=False, partial_offload={})
    return replace(runtime, knobs=knobs)


def refuse_unplayable(plan: Plan, facts: ModelFacts | None) -> None:
    """Raise PlanError with everything in a plan that cannot be run; facts where they are known."""
    faults = [*_workload_faults(plan), *_rule_faults(plan, facts)]
    if facts is not None:
        faults += _model_faults(plan, facts)
    if faults:
        raise PlanError(f"plan for {plan.model.name}: mist apply cannot run it; it", faults)


def refuse_world(plan: Plan, num_ranks: int) -> None:
    """Raise InputError unless there are as many ranks as the plan has."""
    planned = sum(stage.devices[1] for stage in plan.stages)
    if planned != num_ranks:
        raise InputError(
            f"the plan is for {planned} ranks, but {num_ranks} were started. "
            f"Start {planned}, or plan for --gpus {num_ranks}."
        )


def refuse_small_host(plan: Plan, host_bytes: int, ranks_per_host: int) -> None:
    """Raise InputError when what the ranks of one machine offload does not fit its memory."""
    held_bytes = [offloaded_bytes(plan, i) for i in range(len(plan.stages))]
    needed = fullest_host_bytes(plan.stages, held_bytes, ranks_per_host)
    if needed > host_bytes:
        raise InputError(
            f"offload needs {needed / GIB:.1f} GiB of host memory for {ranks_per_host} ranks, but "
            f"this machine has {host_bytes / GIB:.1f} GiB. Plan with lower offload ratios."
        )


def offloaded_bytes(plan: Plan, stage: int) -> int:
    """Bytes that one rank of a stage keeps on the host: what was predicted, at least its states.

    Of those that are trained.
    """
    own, work, runtime = plan.stages[stage], plan.workload, load_runtime(RUNTIME).profile
    params = plan.model.num_trainable * own.num_layers / plan.num_layers / own.tp
    rows, each_bytes = runtime.states_of(work.precision, work.optimizer), 0.0
    for name in ("weights", "grads", "optimizer"):
        items = runtime.hosted_items(name)
        hosted = sum_states(rows, own.zero, items).bytes_per_param(own.dp_shard)
        each_bytes += getattr(own.offload, name) * hosted
    return max(plan.estimate.stages[stage].host_bytes, int(each_bytes * params))


def _workload_faults(plan: Plan) -> Iterator[Fault]:
    if plan.runtime != RUNTIME:
        words = f"{plan.runtime} is run by its own framework; mist apply runs plans for {RUNTIME}"
        yield Fault(path="runtime", message=words)
    if plan.workload.precision is Precision.FP16:
        words = "fp16 needs loss scaling, which mist apply has not; use bf16 or fp32"
        yield Fault(path="workload.precision", message=words)
    if plan.workload.compile:
        words = "mist apply runs models as they are; plan with compile: false"
        yield Fault(path="workload.compile", message=words)


def _rule_faults(plan: Plan, facts: ModelFacts | None) -> Iterator[Fault]:
    """What the rule book says of each stage, of its layers, and of the stages together."""
    columns, runtime = layout_columns(plan.layout), load_runtime(RUNTIME).profile
    if facts is not None:
        runtime = as_applied(runtime, facts)
    yield from stage_faults(apply_rules(runtime, plan.workload, facts), columns)
    yield from level_faults(runtime, plan.layout)
    for message in broken_between(facts, plan.schedule.kind, columns):
        yield Fault(path="stages", message=message)


def _model_faults(plan: Plan, facts: ModelFacts) -> Iterator[Fault]:
    for number, stage in enumerate(plan.stages):
        if stage.sp and facts.whole_sequence is not None:
            words = f"mist apply cannot divide the sequence of {facts.name}: {facts.whole_sequence}"
            yield Fault(path=f"stages[{number}].sp", message=f"{words}; plan again")
    known = plan.model
    if known.fingerprint != facts.fingerprint:
        planned = known.params, known.num_trainable
        before, now = difference_words(planned, (facts.num_params, facts.num_trainable))
        yield Fault(
            path="model.fingerprint",
            message=f"the plan is for another model ({known.params:,} parameters{before}; "
            f"{facts.name} from {known.source} has {facts.num_params:,}{now}); plan again",
        )
    elif plan.num_layers != facts.num_layers:
        words = f"the stages have {plan.num_layers} layers, {facts.name} has {facts.num_layers}"
        yield Fault(path="stages", message=words)
