"""What of a plan `mist apply` cannot run, said before any rank starts. Torch-free.

Each rule looks at a whole plan and gives a message for each thing that it finds: what was asked,
what was found, which rule failed, what to try. Those that need the model take its facts.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Final

from mist.errors import Fault, InputError, PlanError
from mist.model.summary import ModelFacts, difference_words
from mist.plans.plan import Plan, StagePlan, fullest_host_bytes
from mist.plans.workload import Precision, ScheduleKind
from mist.rules.combinations import (
    TAKES_TURNS,
    broken,
    broken_between,
    broken_by_levels,
    division_rules,
)
from mist.units import GIB

STATE_BYTES: Final = 8  # fp32 weights and gradients, or both moments, of one parameter

Rule = Callable[[Plan], Iterator[Fault]]


def refuse_unplayable(plan: Plan, facts: ModelFacts | None) -> None:
    """Raise PlanError with everything in a plan that cannot be run; facts where they are known."""
    faults = [fault for rule in RULES for fault in rule(plan)]
    if facts is not None:
        faults += [fault for check in MODEL_RULES for fault in check(plan, facts)]
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
    own = plan.stages[stage]
    params = plan.model.num_trainable * own.num_layers / plan.num_layers / own.tp
    states = (own.offload.weights + own.offload.optimizer) * STATE_BYTES * params / own.dp_shard
    return max(plan.estimate.stages[stage].host_bytes, int(states))


def _runtime(plan: Plan) -> Iterator[Fault]:
    if plan.runtime != "torch":
        words = f"{plan.runtime} is run by its own framework; mist apply runs plans for torch"
        yield Fault(path="runtime", message=words)
    if plan.workload.precision is Precision.FP16:
        words = "fp16 needs loss scaling, which mist apply has not; use bf16 or fp32"
        yield Fault(path="workload.precision", message=words)
    if plan.workload.compile:
        words = "mist apply runs models as they are; plan with compile: false"
        yield Fault(path="workload.compile", message=words)


def _axes(plan: Plan) -> Iterator[Fault]:
    for index, stage in enumerate(plan.stages):
        for axis, size in (("cp", stage.cp), ("ep", stage.ep)):
            if size > 1:
                words = f"{axis} {size}: context and expert parallelism are not run yet; use 1"
                yield Fault(path=f"stages[{index}].{axis}", message=words)
        if stage.sp and plan.workload.seq_len % stage.tp:
            words = f"tp {stage.tp} does not divide the sequence of {plan.workload.seq_len} tokens"
            yield Fault(path=f"stages[{index}].sp", message=words)


def _schedule(plan: Plan) -> Iterator[Fault]:
    kind, count, num_stages = plan.schedule.kind, plan.num_micro_batches, len(plan.stages)
    if count < num_stages:
        yield Fault(
            path="num_micro_batches",
            message=f"{count} micro-batches cannot fill {num_stages} pipeline stages; "
            "use at least one for each (a smaller micro_batch, or fewer stages)",
        )
    if kind is ScheduleKind.INTERLEAVED and num_stages == 1:
        words = "interleaved needs at least 2 stages; use 1f1b for one"
        yield Fault(path="schedule.kind", message=words)
    elif kind in TAKES_TURNS and count % max(count // num_stages, 1):
        words = f"{kind} runs micro-batches in rounds: {count} make no equal rounds of {num_stages}"
        yield Fault(path="num_micro_batches", message=f"{words} or more")
    yield from _turns(plan)


def _turns(plan: Plan) -> Iterator[Fault]:
    """What a schedule asks of the stages."""
    kind = plan.schedule.kind
    for message in broken_between(None, kind, [asdict(stage) for stage in plan.stages]):
        yield Fault(path="schedule.kind", message=message)
    for index, stage in enumerate(plan.stages):
        if kind is ScheduleKind.ZERO_BUBBLE:
            yield from _split_backward(index, stage)
        columns = {"activations": stage.offload.activations, "schedule": kind.value}
        for message in broken_by_levels(stage.levels, columns):
            yield Fault(path=f"stages[{index}].memory", message=message)


def _split_backward(index: int, stage: StagePlan) -> Iterator[Fault]:
    """What zero-bubble's split backward pass cannot run with."""
    if stage.zero == 3:
        yield Fault(
            path=f"stages[{index}].zero",
            message="zero-bubble splits the backward pass, and FSDP2 then loses gradients of "
            "parameters that it drops after the forward pass (ZeRO-3); use zero 2, or 1f1b",
        )
    if stage.offload.activations > 0:
        yield Fault(
            path=f"stages[{index}].offload.activations",
            message="zero-bubble splits the backward pass, which keeps what it fetches of every "
            "micro-batch to the end of the step; use 1f1b",
        )
    if stage.offload.grads > 0:
        yield Fault(
            path=f"stages[{index}].offload.grads",
            message="zero-bubble reduces gradients once a step, and until then all of them are on "
            "the device; offload no weights and grads, or use 1f1b",
        )


def _offload(plan: Plan) -> Iterator[Fault]:
    for index, stage in enumerate(plan.stages):
        path, ratios = f"stages[{index}]", stage.offload
        if ratios.weights != ratios.grads:
            words = (
                f"weights {ratios.weights} and grads {ratios.grads} move together; use one ratio"
            )
            yield Fault(path=f"{path}.offload", message=words)
        if max(ratios.weights, ratios.grads) > 0 and stage.zero < 2:
            words = f"weights are offloaded as ZeRO-2 or ZeRO-3 shards, found zero {stage.zero}"
            yield Fault(path=f"{path}.zero", message=words)
        if max(ratios.weights, ratios.grads) > 0 and stage.dp_replicate > 1:
            yield Fault(
                path=f"{path}.dp_replicate",
                message="FSDP2 keeps gradients that wait for their sum over copies of the states "
                "on the device; offload no weights and grads, or use dp_replicate 1",
            )


def _same_model(plan: Plan, facts: ModelFacts) -> Iterator[Fault]:
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


def _divisible(plan: Plan, facts: ModelFacts) -> Iterator[Fault]:
    undivided = tuple(division_rules(facts))
    for index, stage in enumerate(plan.stages):
        for message in broken(undivided, {"tp": stage.tp}):
            yield Fault(path=f"stages[{index}].tp", message=message)
        if stage.tp > 1 and facts.tp_limits is None:
            words = f"no tensor-parallel rules are known for {facts.name}; use tp 1"
            yield Fault(path=f"stages[{index}].tp", message=words)
        for limit in facts.tp_limits or ():
            if limit.size % stage.tp:
                words = f"tp {stage.tp} does not divide the {limit.size} {limit.label}"
                yield Fault(path=f"stages[{index}].tp", message=f"{words} of {facts.name}")


def _in_a_row(plan: Plan, facts: ModelFacts) -> Iterator[Fault]:
    if len(plan.stages) == 1:
        return
    if not facts.sequential:
        words = f"layers of {facts.name} exchange tensors with others than their neighbours"
        yield Fault(path="stages", message=f"{words}; it runs on one stage only")
    stages = [asdict(stage) for stage in plan.stages]
    for message in broken_between(facts, ScheduleKind.ONE_F_ONE_B, stages):
        yield Fault(path=f"stages[{len(plan.stages) - 1}]", message=message)


RULES: Final[tuple[Rule, ...]] = (_runtime, _axes, _schedule, _offload)
MODEL_RULES: Final = (_same_model, _divisible, _in_a_row)
