"""Whether a plan file can be judged as it stands: its model, its cluster, its knobs, the rules.

What a plan says and the prediction would pass over is a fault, not a note: a plan that is called
fitting must be one that can run.
"""

from collections.abc import Iterator, Sequence

from mist.errors import Fault
from mist.model.summary import difference_words
from mist.pareto.default_partition import dealt_layers
from mist.plans.knobs import STAGE_KNOBS
from mist.plans.plan import Layout, Plan, StagePlan
from mist.plans.workload import MemoryLevel
from mist.rules.between_stages import broken_between
from mist.rules.combinations import AXES_AT_REST
from mist.rules.levels import head_not_priced, level_faults, not_priced
from mist.rules.rule import layout_columns, stage_faults
from mist.symbolic.job import Job


def plan_against(plan: Plan, job: Job) -> tuple[Fault, ...]:
    """Every fault of a plan for the model and platform that it names; the model's come alone."""
    return tuple(_model_faults(plan, job)) or tuple(_other_faults(plan, job))


def _model_faults(plan: Plan, job: Job) -> Iterator[Fault]:
    graph, known = job.facts, plan.model
    planned, found = (known.params, known.num_trainable), (graph.num_params, graph.num_trainable)
    before, now = difference_words(planned, found)
    if known.fingerprint != graph.fingerprint:
        yield Fault(
            path="model.fingerprint",
            message=f"the plan is for another model: it was made for {known.name} with "
            f"{known.params} parameters{before}, {known.source} is now {graph.name} with "
            f"{graph.num_params}{now}",
        )
    elif planned != found:
        yield Fault(
            path="model.params",
            message=f"{known.params}{before}, but {graph.name} has {graph.num_params}{now}",
        )
    if plan.num_layers != graph.num_layers:
        yield Fault(
            path="stages",
            message=f"the stages cover {plan.num_layers} layers, "
            f"{graph.name} has {graph.num_layers}",
        )


def _other_faults(plan: Plan, job: Job) -> Iterator[Fault]:
    platform = job.platform
    if plan.cluster.gpus_per_node != platform.gpus_per_node:
        yield Fault(
            path="cluster.gpus_per_node",
            message=f"{plan.cluster.gpus_per_node}, but {plan.cluster.num_gpus} GPUs of "
            f"{platform.cluster.name} are {platform.gpus_per_node} per node",
        )
    if plan.workload.compile:
        yield Fault(path="workload.compile", message="compiled models are not predicted")
    for index, stage in enumerate(plan.stages):
        yield from _sequence_faults(f"stages[{index}]", stage, job)
    columns = layout_columns(plan.layout)
    yield from stage_faults((*AXES_AT_REST, *job.rules), columns)
    for message in broken_between(job.facts, plan.schedule.kind, columns):
        yield Fault(path="stages", message=message)
    yield from pipeline_faults(job, plan.layout)


def pipeline_faults(job: Job, layout: Layout) -> Iterator[Fault]:
    """What the runtime cannot do of the memory levels, the split and the differences of stages."""
    runtime = job.platform.runtime
    yield from level_faults(runtime, layout)
    for level in dict.fromkeys(level for stage in layout.stages for level in stage.levels):
        if level in runtime.levels and level not in job.levels:
            yield Fault(path="stages", message=not_priced(level, job.facts.name))
    if (head := layout.stages[-1].head) not in job.heads and runtime.converts_layers:
        yield Fault(path="stages", message=head_not_priced(head, job.facts.name))
    if not runtime.knobs.unlike_stages:
        yield from _unlike_faults(runtime.name, layout.stages)
    if not runtime.knobs.uneven_layers:
        yield from _split_faults(job, layout)


def _unlike_faults(name: str, stages: Sequence[StagePlan]) -> Iterator[Fault]:
    """Stages that differ in more than the number of their layers."""
    knobs = (*(knob.name for knob in STAGE_KNOBS), "offload")
    unlike = [knob for knob in knobs if len({str(getattr(s, knob)) for s in stages}) > 1]
    if unlike:
        words = f"runtime {name} has stages alike, these differ in {', '.join(unlike)}"
        yield Fault(path="stages", message=words)
    deeper = [level for level in MemoryLevel if any(stage.num_at(level) for stage in stages)][1:]
    for level in deeper:  # the same number in each, or all that a shorter stage has
        most = max(stage.num_at(level) for stage in stages)
        if any(stage.num_at(level) != min(most, stage.num_layers) for stage in stages):
            counts = ", ".join(str(stage.num_at(level)) for stage in stages)
            words = f"runtime {name} recomputes as many layers in each stage, found {counts}"
            yield Fault(path="stages", message=f"{words} at {level}")


def _split_faults(job: Job, layout: Layout) -> Iterator[Fault]:
    """A split of the layers that is not the one which the runtime makes by itself."""
    own = dealt_layers(job, len(layout.stages) * layout.schedule.vpp)
    chunks = zip(*(stage.layers for stage in layout.stages), strict=True)
    counts = tuple(count for runs in chunks for _, count in runs)
    if own is not None and counts != own:
        words = f"runtime {job.platform.runtime.name} deals {job.num_layers} layers out as"
        yield Fault(
            path="stages",
            message=f"{words} {','.join(map(str, own))} and takes no other split, found "
            f"{','.join(map(str, counts))}",
        )


def _sequence_faults(path: str, stage: StagePlan, job: Job) -> Iterator[Fault]:
    """Sequence parallelism is the runtime's habit, not a choice that predictions know."""
    runtime = job.platform.runtime
    shards_sequence = stage.tp > 1 and runtime.knobs.sequence_parallel
    if stage.sp != shards_sequence:
        yield Fault(
            path=f"{path}.sp",
            message=f"runtime {runtime.name} with tp {stage.tp} is predicted with "
            f"sp {str(shards_sequence).lower()} only",
        )
