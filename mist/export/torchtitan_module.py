"""torchtitan 0.3: a package with a config_registry.py, and a script that starts it.

Fields: torchtitan/config/configs.py of 0.3.0. A configuration there is a Python function.
With a pipeline training.local_batch_size is micro_batch * num_micro_batches, without one it is
micro_batch, and the global batch gives the accumulation.
"""

from collections.abc import Iterator
from typing import Final

from mist.export.launcher_lines import head, launch_script
from mist.export.target import (
    ExportLoss,
    ExportSource,
    Expresses,
    Written,
    added,
    refused,
    undivided_offload,
)
from mist.plans.memory_levels import LEVELS, OWN_PART
from mist.plans.plan import Plan
from mist.plans.workload import MemoryLevel, Precision, ScheduleKind

MODULE: Final = "mist_plan/config_registry.py"
SCHEDULE_NAMES: Final = {
    ScheduleKind.GPIPE: "GPipe",
    ScheduleKind.ONE_F_ONE_B: "1F1B",
    ScheduleKind.INTERLEAVED: "Interleaved1F1B",
    ScheduleKind.ZERO_BUBBLE: "InterleavedZeroBubble",
}
DTYPES: Final = {Precision.BF16: "bfloat16", Precision.FP32: "float32"}
RESHARD: Final = {2: "never", 3: "always"}
# The function of torchtitan that makes the model of each name.
MODELS: Final = {
    "llama3-8b": "llama3.llama3_8b",
    "llama3-70b": "llama3.llama3_70b",
    "llama3-405b": "llama3.llama3_405b",
    "qwen3-14b": "qwen3.qwen3_14b",
    "qwen3-32b": "qwen3.qwen3_32b",
    "qwen3-30b-a3b": "qwen3.qwen3_30b_a3b",
}

LAYER_LIST: Final = '''
class LayerListAC(FullAC):
    """Recomputes the layers of a list; torchtitan's own takes all of them."""

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        layers: tuple[int, ...] = ()

    def _wrap_block(self, module, *, base_fqn=None):
        layer = int(base_fqn.rpartition(".")[2])
        if layer not in self.config.layers:
            return module
        return FullAC._wrap_block(self, module, base_fqn=base_fqn)
'''


def _faults(plan: Plan) -> list[ExportLoss]:
    """What torchtitan finds only when its trainer starts."""
    stage, seq_len = plan.stages[0], plan.workload.seq_len
    tp = stage.tp
    if losses := undivided_offload(plan, "torchtitan"):
        return losses
    if seq_len % (2 * tp) and tp > 1:
        words = f"{seq_len} tokens; torchtitan needs a multiple of 2 * tp = {2 * tp}"
        return [refused("workload.seq_len", words)]
    return []


TORCHTITAN: Final = Expresses(
    zero={0: 0, 1: 2, 2: 2, 3: 3},
    schedules=SCHEDULE_NAMES,
    divides_alone=False,
    copies=True,
    precisions=tuple(DTYPES),
    partly=(OWN_PART, MemoryLevel.SAC_HALF),  # SelectiveAC keeps every other product
    repeats="any",
    sequence=True,
    hosted=frozenset({"together"}),
    faults=_faults,
)


def write_torchtitan(subject: ExportSource) -> Written:
    """The package and the script that starts torchtitan's trainer with it."""
    plan = subject.plan
    losses = [added("runtime", "torch >= 2.14 is needed by torchtitan 0.3.0")]
    base = MODELS.get(plan.model.name)
    if base is None:
        words = f"{plan.model.name} is none of torchtitan's; put your own function in place of BASE"
        losses.append(added("model", f"{words} in {MODULE}"))
        base = "llama3.llama3_debugmodel"
    if len(plan.stages) > 1:
        words = "training.disable_cuda_graphs = True, which torchtitan's pipelines need"
        losses.append(added("stages", words))
    command = ["-m", "torchtitan.train", "--module", "mist_plan", "--config", "mist_plan", '"$@"']
    env = ['export PYTHONPATH="$(dirname "$0")${PYTHONPATH:+:$PYTHONPATH}"']
    return Written(
        files={
            MODULE: _module(subject, base),
            "mist_plan/__init__.py": "\n".join(head(subject, "A package for torchtitan.")) + "\n",
            "launch.sh": launch_script(subject, "Starts torchtitan.", command, env=env),
        },
        added=losses,
    )


def _module(subject: ExportSource, base: str) -> str:
    plan = subject.plan
    family, _, function = base.partition(".")
    indented = "\n".join(
        f"        {name}={value},  # {field}" for name, value, field in _fields(plan)
    )
    rest = "\n".join(f"    config.{line}" for line in _assignments(plan))
    return f"""{chr(10).join(head(subject, "A configuration of torchtitan 0.3 (torch >= 2.14)."))}
from dataclasses import dataclass

from torchtitan.config import ParallelismConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.{family}.config_registry import {function} as BASE  # model.name

{LAYER_LIST}

def mist_plan():
    config = BASE()
    config.parallelism = ParallelismConfig(
{indented}
    )
{rest}
    return config
"""


def _fields(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Fields of ParallelismConfig, their values as Python, and the fields of the plan."""
    stage, pp = plan.stages[0], len(plan.stages)
    copies = stage.dp_replicate if stage.zero else stage.dp
    yield "data_parallel_replicate_degree", str(copies), "stages[].dp_replicate, zero"
    yield "data_parallel_shard_degree", str(stage.dp // copies), "stages[].dp, zero"
    if stage.zero:
        yield "fsdp_reshard_after_forward", f'"{RESHARD[stage.zero]}"', "stages[].zero"
    yield "tensor_parallel_degree", str(stage.tp), "stages[].tp"
    yield "enable_sequence_parallel", str(stage.sp or stage.tp == 1), "stages[].sp"
    yield "pipeline_parallel_degree", str(pp), "stages"
    if pp > 1:
        yield (
            "pipeline_parallel_schedule",
            f'"{SCHEDULE_NAMES[plan.schedule.kind]}"',
            "schedule.kind",
        )
        yield "pipeline_parallel_microbatch_size", str(stage.micro_batch), "stages[].micro_batch"
        yield "module_fqns_per_model_part", repr(_parts(plan)), "stages[].layers"


def _parts(plan: Plan) -> list[list[str]]:
    """Names of the modules of each part of the pipeline, in the order of the model."""
    runs = sorted(run for stage in plan.stages for run in stage.layers)
    parts = [[f"layers.{layer}" for layer in range(first, first + n)] for first, n in runs]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "lm_head"]
    return parts


def _assignments(plan: Plan) -> Iterator[str]:
    """Assignments to fields of the configuration, each with the field of the plan."""
    stage, work = plan.stages[0], plan.workload
    pipeline = len(plan.stages) > 1
    local = stage.micro_batch * (plan.num_micro_batches if pipeline else 1)
    batch_field = "stages[].micro_batch" + (" * num_micro_batches" if pipeline else "")
    yield f"training.local_batch_size = {local}  # {batch_field}"
    yield f"training.global_batch_size = {work.global_batch}  # workload.global_batch"
    yield f"training.seq_len = {work.seq_len}  # workload.seq_len"
    yield f'training.mixed_precision_param = "{DTYPES[work.precision]}"  # workload.precision'
    yield f"training.enable_cpu_offload = {stage.offload.weights == 1.0}  # stages[].offload"
    if pipeline:
        yield "training.disable_cuda_graphs = True  # stages: needed by pipelines"
    yield f"compile.enable = {work.compile}  # workload.compile"
    yield f"activation_checkpoint = {_recompute(plan)}  # stages[].memory"


def _recompute(plan: Plan) -> str:
    if any(set(TORCHTITAN.partly) & set(stage.levels) for stage in plan.stages):
        return "SelectiveAC.Config()"
    layers = sorted(_repeated(plan))
    if not layers:
        return "None"
    if len(layers) == plan.num_layers:
        return "FullAC.Config()"
    return f"LayerListAC.Config(layers=({', '.join(map(str, layers))},))"


def _repeated(plan: Plan) -> Iterator[int]:
    """Layers of the model that are run again whole."""
    for stage in plan.stages:
        layers = [first + n for first, count in stage.layers for n in range(count)]
        for layer, level in zip(layers, stage.levels, strict=True):
            if LEVELS[level].repeats == "all":
                yield layer
