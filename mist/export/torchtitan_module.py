"""torchtitan 0.3: a package with a config_registry.py, and a script that starts it; the inverse.

Fields: torchtitan/config/configs.py of 0.3.0. A configuration there is a Python function. It is
read as a syntax tree, and never run: calls of ParallelismConfig and TrainingConfig, assignments to
`config.parallelism.x`, and options of the command line, --parallelism.tensor_parallel_degree 2.
With a pipeline training.local_batch_size is micro_batch * num_micro_batches, without one it is
micro_batch, and the global batch gives the accumulation.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from mist.errors import InputError
from mist.export.command_words import options_of
from mist.export.launcher_lines import head, launch_script
from mist.export.target import (
    Configuration,
    ExportLoss,
    ExportSource,
    Expresses,
    Written,
    added,
    refused,
    undivided_offload,
)
from mist.plans.memory_levels import KEEPS_ALL, LEVELS, PARTLY, REPEATS_ALL
from mist.plans.plan import Offload, Plan
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.workload import Precision, ScheduleKind

MODULE: Final = "mist_plan/config_registry.py"
NAMES: Final = {
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
    schedules=NAMES,
    divides_alone=False,
    copies=True,
    precisions=tuple(DTYPES),
    partly=True,
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
        yield "pipeline_parallel_schedule", f'"{NAMES[plan.schedule.kind]}"', "schedule.kind"
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
    if any(level in PARTLY for stage in plan.stages for level in stage.levels):
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


def recognises_torchtitan(text: str) -> bool:
    """Whether a text is a module for torchtitan, or has options of it."""
    return "torchtitan" in text or "--parallelism." in text


CALLS: Final = {"ParallelismConfig": "parallelism.", "TrainingConfig": "training."}
CHECKPOINT: Final = "activation_checkpoint"
# Those that decide how a model is trained; loggers, checkpoints and data do not.
SECTIONS: Final = ("parallelism", "training", "compile", "optimizer", "model_spec", "comm")
PARTS: Final = "parallelism.module_fqns_per_model_part"
Settings = Mapping[str, Any]
COUNTS: Final = {
    "tp": "parallelism.tensor_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
}

READ: Final = frozenset(
    f"parallelism.{name}"
    for name in (
        "data_parallel_replicate_degree", "data_parallel_shard_degree",
        "fsdp_reshard_after_forward", "tensor_parallel_degree", "enable_sequence_parallel",
        "pipeline_parallel_degree", "pipeline_parallel_schedule",
        "pipeline_parallel_microbatch_size", "module_fqns_per_model_part",
    )
) | frozenset(
    f"training.{name}"
    for name in (
        "local_batch_size", "global_batch_size", "seq_len", "mixed_precision_param",
        "enable_cpu_offload", "disable_cuda_graphs",
    )
) | {CHECKPOINT, f"{CHECKPOINT}.layers"}  # fmt: skip


def read_torchtitan(text: str, path: str) -> Configuration:
    """The layout of a module or of command-line options. Raises InputError naming a setting."""
    settings = dict(_settings(text, path) if path.endswith(".py") else _typed(text, path))
    whole = _WholeSettings(settings, path)
    pp = whole.number("parallelism.pipeline_parallel_degree", 1)
    parts = _chunks(settings, path, pp)
    batch = whole.number("training.local_batch_size", 8)
    micro_batch = whole.number("parallelism.pipeline_parallel_microbatch_size", 1)
    copies = whole.number("parallelism.data_parallel_replicate_degree", 1)
    shard = whole.number("parallelism.data_parallel_shard_degree", -1)
    offload = float(settings.get("training.enable_cpu_offload") is True)
    zero = _zero(settings, shard, pp)
    global_batch = whole.number("training.global_batch_size", -1)
    return Configuration(
        knobs={
            **{name: whole.number(setting, 1) for name, setting in COUNTS.items()},
            "vpp": max(len(parts) // pp, 1),
            "zero": zero,
            "dp_replicate": copies if zero else 1,
            "micro_batch": micro_batch if pp > 1 else batch,
        },
        checkpoint=_checkpoint(settings, path, parts, pp),
        schedule=_schedule(settings, path),
        offload=Offload(weights=offload, grads=offload, optimizer=offload),
        layers=tuple(len(part) for part in parts),
        seq_len=whole.number("training.seq_len", 2048),
        global_batch=None if global_batch < 1 else global_batch,
        precision=_precision(settings),
        num_micro_batches=batch // micro_batch if pp > 1 else None,
        dp=copies * shard if shard > 0 else None,
        num_layers=sum(len(part) for part in parts) or None,
        unmodelled=tuple(_unmodelled(settings)),
    )


class _WholeSettings:
    """Settings that are whole numbers."""

    def __init__(self, settings: Settings, path: str) -> None:
        self._settings, self._path = settings, path

    def number(self, name: str, default: int) -> int:
        """The number of a setting. Raises InputError."""
        value = self._settings.get(name, default)
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,15}", text):
            raise InputError(f"{self._path}: {name} {text:.40} is no whole number.")
        return int(text)


def _settings(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Settings of a module by their dotted names; a value that is no literal is its text."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} is not Python: {error}.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield from _of_assignment(ast.unparse(node.targets[0]), node.value)


def _of_call(node: ast.Call) -> Iterator[tuple[str, Any]]:
    name = ast.unparse(node.func)
    for word in node.keywords:
        if prefix := CALLS.get(name.rpartition(".")[2]):
            yield f"{prefix}{word.arg}", _literal(word.value)
        elif name.endswith("AC.Config") and word.arg:
            yield f"{CHECKPOINT}.{word.arg}", _literal(word.value)
        elif word.arg == CHECKPOINT:
            yield CHECKPOINT, ast.unparse(word.value)


def _of_assignment(target: str, value: ast.expr) -> Iterator[tuple[str, Any]]:
    """A field that is set on a configuration; whole sections are calls, which are read by part."""
    name = target.partition(".")[2]
    if name == CHECKPOINT:
        yield name, ast.unparse(value)
    elif name.partition(".")[0] in SECTIONS and "." in name:
        yield name, _literal(value)


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _typed(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Settings of a command line."""
    for option, values in options_of(text, path).items():
        name = option.removeprefix("--").replace("-", "_")
        if "." in name:
            value = " ".join(values)
            yield name, {"": True, "True": True, "False": False}.get(value, value)
    for word in re.findall(r"activation-checkpoint:(\w+)", text):
        yield CHECKPOINT, word


def _zero(settings: Settings, shard: int, pp: int) -> int:
    """ZeRO-3 where parameters are given back after the forward pass, ZeRO-2 where they are kept."""
    if shard == 1:
        return 0
    policy = settings.get("parallelism.fsdp_reshard_after_forward", "default")
    kept = policy == "never" or (policy == "default" and pp > 1)
    return 2 if kept else 3


def _chunks(settings: Settings, path: str, pp: int) -> list[list[int]]:
    """Layers of each part of the pipeline."""
    value = settings.get(PARTS)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, list) for part in value):
        # A list on the command line is taken apart at its commas, without an error.
        raise InputError(f"{path}: {PARTS} is no list of lists of names. Write it in Python.")
    if len(value) % max(pp, 1):
        raise InputError(f"{path}: {PARTS} has {len(value)} parts, no multiple of {pp} stages.")
    found = [[re.fullmatch(r"layers\.(\d+)", str(name)) for name in part] for part in value]
    return [[int(name[1]) for name in part if name] for part in found]


def _checkpoint(settings: Settings, path: str, parts: Sequence[Sequence[int]], pp: int) -> str:
    words = str(settings.get(CHECKPOINT, "None"))
    if words == "None":
        return KEEPS_ALL.value
    if "LayerList" in words:
        layers = settings.get(f"{CHECKPOINT}.layers")
        if not isinstance(layers, tuple | list):
            raise InputError(f"{path}: {CHECKPOINT}.layers is no list of layers.")
        if not parts:
            return str(len(layers))
        own = [[layer for part in parts[stage::pp] for layer in part] for stage in range(pp)]
        return ",".join(str(len(set(stage) & set(layers))) for stage in own)
    return REPEATS_ALL.value if re.search("(?i)full", words) else PARTLY[0].value


def _schedule(settings: Settings, path: str) -> ScheduleKind:
    name = str(settings.get("parallelism.pipeline_parallel_schedule", NAMES[DEFAULT_KIND]))
    for kind, known in NAMES.items():
        if known.lower() == name.lower():
            return kind
    known = ", ".join(NAMES.values())
    raise InputError(
        f"{path}: parallelism.pipeline_parallel_schedule {name} is not predicted. Known: {known}."
    )


def _precision(settings: Settings) -> Precision:
    name = settings.get("training.mixed_precision_param", DTYPES[Precision.BF16])
    return next((each for each, dtype in DTYPES.items() if dtype == name), Precision.BF16)


def _unmodelled(settings: Settings) -> Iterator[str]:
    for name, value in settings.items():
        off = name == "compile.enable" and value is False
        if name not in READ and not off:
            yield f"{name} = {value}"
    if settings.get("parallelism.enable_sequence_parallel") is False:
        yield "parallelism.enable_sequence_parallel = False"
