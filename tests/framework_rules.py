"""What frameworks ask of a configuration, read in their own sources: the oracle of printed plans.

Nothing here comes from `mist.rules.combinations` or from profiles: each line names where its
framework refuses.
"""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Final

from mist.model.summary import ModelFacts
from mist.plans.plan import Plan, StagePlan
from mist.plans.workload import MemoryLevel, Precision, ScheduleKind

Check = Callable[[Plan, ModelFacts], Iterator[str]]


def refusals(plan: Plan, facts: ModelFacts) -> list[str]:
    """What the framework of a plan refuses in it."""
    return [*_anywhere(plan, facts), *RUNTIMES[plan.runtime](plan, facts)]


def _anywhere(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """Sizes that no launcher accepts."""
    for stage in plan.stages:
        yield from _ranks(stage, plan)
        yield from _heads(stage, plan, facts)
    if sum(stage.devices[1] for stage in plan.stages) != plan.cluster.num_gpus:
        yield "the world is not dp * tp * pp"
    if len(plan.stages) > 1 and not facts.sequential:
        yield "skip connections over pipeline stages"
    if len(plan.stages) == 1 and plan.schedule.kind is not ScheduleKind.ONE_F_ONE_B:
        yield "a pipeline schedule of one stage"


def _ranks(stage: StagePlan, plan: Plan) -> Iterator[str]:
    if stage.dp * stage.tp != stage.devices[1]:
        yield "dp * tp is not the devices of the stage"
    if stage.dp * stage.micro_batch * plan.num_micro_batches != plan.workload.global_batch:
        yield "dp * micro-batch * accumulation is not the global batch"
    if plan.cluster.gpus_per_node % stage.tp:
        yield "tensor-parallel groups across nodes"


def _heads(stage: StagePlan, plan: Plan, facts: ModelFacts) -> Iterator[str]:
    for limit in facts.tp_limits or ():
        if limit.size % stage.tp:
            yield f"{limit.label} are not divisible by tp"
    if facts.tp_limits is None and stage.tp > 1:
        yield "no tensor-parallel plan for this model"
    if stage.sp and plan.workload.seq_len % stage.tp:
        yield "sequence parallelism of a sequence that tp does not divide"


def _alike(plan: Plan) -> Iterator[str]:
    """One command line for all ranks: every stage does the same."""
    if len({_strategy(stage) for stage in plan.stages}) > 1:
        yield "stages with their own dp, tp, micro-batch, ZeRO or offload"


def _strategy(stage: StagePlan) -> tuple[object, ...]:
    ratios = stage.offload
    away = (ratios.weights, ratios.grads, ratios.optimizer, ratios.activations)
    return stage.dp, stage.tp, stage.micro_batch, stage.zero, stage.dp_replicate, away


def _whole(plan: Plan, *levels: MemoryLevel) -> Iterator[str]:
    """One switch for recomputation: all layers of all stages, or none."""
    used = {level for stage in plan.stages for level in stage.memory if stage.memory[level]}
    if len(used) > 1:
        yield "some layers only recomputed"
    if used - set(levels):
        yield "a kind of recomputation that it has not"


def _kept(plan: Plan) -> Iterator[str]:
    """No state in host memory."""
    if any(any(_strategy(stage)[-1]) for stage in plan.stages):  # type: ignore[call-overload]
        yield "offload"


def _zero(plan: Plan, *known: int) -> Iterator[str]:
    if any(stage.zero not in known for stage in plan.stages):
        yield "a ZeRO level that it has not"


def _no_pipeline(plan: Plan) -> Iterator[str]:
    if len(plan.stages) > 1:
        yield "pipeline parallelism"


def _schedules(plan: Plan, *known: ScheduleKind) -> Iterator[str]:
    if len(plan.stages) > 1 and plan.schedule.kind not in known:
        yield f"schedule {plan.schedule.kind}"


def _megatron(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """Megatron-LM core 0.19, megatron/training/arguments.py and core/transformer_config.py."""
    stages, chunks, count = plan.stages, plan.schedule.vpp, plan.num_micro_batches
    yield from _alike(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0, 1)
    yield from _schedules(plan, ScheduleKind.ONE_F_ONE_B, ScheduleKind.INTERLEAVED)
    # arguments.py: num_layers % pipeline stages == 0 unless first, last or a layout is given.
    if facts.num_layers % len(stages):
        yield "layers are not divisible by pipeline stages"
    # arguments.py: layers of a stage % layers of a virtual stage == 0.
    if any(
        count_ * chunks * len(stages) != facts.num_layers for s in stages for _, count_ in s.layers
    ):
        yield "layers of a stage are not divisible by its chunks"
    # schedules.py: micro-batches are divisible by the pipeline size when interleaved.
    if chunks > 1 and count % len(stages):
        yield "micro-batches are not divisible by pipeline stages"
    # transformer_config.py: one recompute_num_layers for each (virtual) stage; none if selective.
    for stage in stages:
        selective = stage.num_at(MemoryLevel.SELECTIVE)
        if selective not in (0, stage.num_layers):
            yield "recompute_num_layers with granularity selective"
        if stage.num_full % chunks or stage.num_full != stages[0].num_full:
            yield "recomputed layers differ between stages or chunks"


def _megatron_deepspeed(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """DeepSpeed's pipeline engine: pipe/engine.py, pipe/module.py."""
    del facts
    yield from _alike(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0, 1)  # engine.py:77: ZeRO-2 and 3 are incompatible with pipelines
    yield from _schedules(plan, ScheduleKind.ONE_F_ONE_B)
    yield from _whole(plan, MemoryLevel.NONE, MemoryLevel.FULL)  # one checkpoint interval


def _deepspeed(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """DeepSpeed 0.19: runtime/zero/config.py, zero/stage3.py, engine.py."""
    del facts
    yield from _no_pipeline(plan)
    yield from _whole(plan, MemoryLevel.NONE, MemoryLevel.FULL)
    for stage in plan.stages:
        away = stage.offload
        if stage.tp > 1 and stage.zero == 3:
            yield "autotp with stage 3"
        if 0 < away.optimizer < 1 and stage.zero != 3:
            yield "partial offloading below stage 3"
        if away.optimizer and stage.zero == 0:
            yield "offload_optimizer without ZeRO"
        if away.weights not in (0, 1) or (away.weights and stage.zero != 3):
            yield "offload_param has no ratio, and is of stage 3"
        if away.weights and not away.optimizer:
            yield "parameter offload without optimizer state offload"
        if away.activations:
            yield "activations are not offloaded by ratio"


def _nanotron(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """nanotron 0.5: config/parallelism_config.py, models/base.py (split by cost), pp engines."""
    yield from _alike(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0, 1)
    yield from _schedules(plan, ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B)
    yield from _whole(plan, MemoryLevel.NONE, MemoryLevel.FULL)
    if plan.num_micro_batches < len(plan.stages) - 1:
        yield "fewer micro-batches than stages"
    counts = [stage.num_layers for stage in plan.stages]
    if min(counts) < 1 or sum(counts) != facts.num_layers:
        yield "a stage without layers"


def _torchtitan(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """torchtitan 0.3: config, distributed/pipeline_parallel.py, distributed/fsdp.py."""
    del facts
    yield from _alike(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0, 3)
    yield from _whole(plan, *MemoryLevel)
    if plan.workload.precision is Precision.FP16:
        yield "mixed_precision_param is bfloat16 or float32"
    yield from _torch_schedule(plan)


def _torch_schedule(plan: Plan) -> Iterator[str]:
    """torch 2.13, distributed/pipelining/schedules.py: rounds of micro-batches."""
    count, stages = plan.num_micro_batches, len(plan.stages)
    if plan.schedule.kind in (ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE):
        if count % max(1, count // stages):
            yield "micro-batches are no whole number of rounds"
        if len({(stage.dp, stage.tp) for stage in plan.stages}) > 1:
            yield "ranks of stages that are not connected one to one"
    if plan.schedule.kind is ScheduleKind.ZERO_BUBBLE:
        if any(stage.num_layers != stage.num_at(MemoryLevel.NONE) for stage in plan.stages):
            yield "a split backward pass of layers that are recomputed"
        if any(stage.zero == 3 and stage.dp > 1 for stage in plan.stages):
            yield "a split backward pass of parameters that are dropped after the forward pass"


def _fsdp1(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """FSDP1 of whole blocks: data parallelism alone, sharded or not."""
    del facts
    yield from _no_pipeline(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0, 3)
    yield from _whole(plan, MemoryLevel.NONE, MemoryLevel.FULL)
    if any(stage.tp > 1 for stage in plan.stages):
        yield "tensor parallelism"


def _torchtune(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """recipes/full_finetune_single_device.py."""
    del facts
    yield from _no_pipeline(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0)
    yield from _whole(plan, MemoryLevel.NONE, MemoryLevel.FULL)
    if any(stage.tp > 1 for stage in plan.stages):
        yield "tensor parallelism"
    if plan.workload.precision is Precision.FP16:
        yield "fp16 precision is not supported in this recipe"


def _aleph(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """The 3D code of arXiv 2311.05610: one (mb, tp, pp, recompute all or none, ZeRO-1)."""
    del facts
    yield from _alike(plan)
    yield from _kept(plan)
    yield from _zero(plan, 0, 1)
    yield from _schedules(plan, ScheduleKind.ONE_F_ONE_B)
    yield from _whole(plan, MemoryLevel.NONE, MemoryLevel.FULL)


def _mist_paper(plan: Plan, facts: ModelFacts) -> Iterator[str]:
    """The artifact's executor: 1F1B of unlike stages, two of its levels, any ratio."""
    del facts
    yield from _schedules(plan, ScheduleKind.ONE_F_ONE_B)
    if any(stage.num_at(MemoryLevel.SELECTIVE) for stage in plan.stages):
        yield "selective recomputation"


RUNTIMES: Final = MappingProxyType(
    {
        "megatron": _megatron,
        "megatron-deepspeed": _megatron_deepspeed,
        "deepspeed-zero3": _deepspeed,
        "nanotron": _nanotron,
        "torchtitan": _torchtitan,
        "fsdp1": _fsdp1,
        "torchtune": _torchtune,
        "aleph": _aleph,
        "mist-fp16": _mist_paper,
    }
)
