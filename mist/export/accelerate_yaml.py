"""accelerate: a YAML file for FSDP2, arguments of transformers' Trainer, a script; the inverse.

Keys: accelerate/commands/config/config_args.py of 1.15.0, TrainingArguments of transformers 5.23.0.
accelerate refuses unknown keys at the top of the file and passes over those below, so that nothing
is written that it does not read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mist.documents import Document, parse_yaml
from mist.errors import InputError
from mist.export.deepspeed_json import leaves
from mist.export.launcher_lines import head, node_script, nodes_of
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
from mist.export.yaml_lines import unread, yaml_lines
from mist.plans.memory_levels import KEEPS_ALL, REPEATS_ALL
from mist.plans.plan import Offload, Plan
from mist.plans.workload import Precision

CONFIG: Final = "accelerate.yaml"
WORDS: Final = {Precision.BF16: "bf16", Precision.FP16: "fp16", Precision.FP32: "no"}
AXES: Final = "parallelism_config.parallelism_config_"


def under_fsdp2(name: str) -> Expresses:
    """What a target called `name` can say that trains by accelerate's FSDP2."""

    def faults(plan: Plan) -> list[ExportLoss]:
        """What accelerate finds only when it starts."""
        stage = plan.stages[0]
        if stage.tp > 1 and not stage.zero:
            words = f"{stage.zero} with tp {stage.tp}; {name} divides tensors under FSDP2 only"
            return [refused("stages[].zero", words)]
        return undivided_offload(plan, name)

    return Expresses(
        zero={0: 0, 1: 2, 2: 2, 3: 3},
        copies=True,
        hosted=frozenset({"together"}),
        faults=faults,
    )


ACCELERATE: Final = under_fsdp2("accelerate")


def write_accelerate(subject: ExportSource) -> Written:
    """The YAML file, the arguments of a Trainer, and a script."""
    plan = subject.plan
    lines = head(subject, "A configuration of accelerate 1.15 (accelerate launch --config_file).")
    # The launcher is accelerate's own: it reads where the ranks stand from the file.
    command = [
        "set -euo pipefail",
        f'exec accelerate launch --config_file "$(dirname "$0")/{CONFIG}" \\',
        '    --machine_rank "${RANK_OF_NODE:-0}" --main_process_ip "${HEAD:-localhost}" "$@"',
    ]
    script = node_script(subject, "Starts a program of yours: launch.sh train.py ...", command)
    words = "micro-batch, accumulation and length are in training_arguments.py, for your program"
    return Written(
        files={
            CONFIG: "\n".join([*lines, *yaml_lines(_rows(plan))]) + "\n",
            "training_arguments.py": _trainer(subject),
            "launch.sh": script,
        },
        added=[added("stages[].micro_batch", words)],
    )


def _rows(plan: Plan) -> Iterator[tuple[str, Any, str]]:
    """Each key, its value and the field of the plan; keys of a section in a row."""
    stage, cluster = plan.stages[0], plan.cluster
    yield "compute_environment", "LOCAL_MACHINE", "cluster"
    yield "distributed_type", "FSDP" if stage.zero else "MULTI_GPU", "stages[].zero"
    yield "num_machines", nodes_of(cluster), "cluster.num_gpus / gpus_per_node"
    yield "num_processes", cluster.num_gpus, "cluster.num_gpus"
    yield "mixed_precision", WORDS[plan.workload.precision], "workload.precision"
    if not stage.zero:
        return
    fsdp = "fsdp_config."
    yield f"{fsdp}fsdp_version", 2, "stages[].zero"
    yield f"{fsdp}fsdp_reshard_after_forward", stage.zero == 3, "stages[].zero"
    yield f"{fsdp}fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "stages[].layers"
    yield f"{fsdp}fsdp_offload_params", stage.offload.weights == 1.0, "stages[].offload"
    yield f"{fsdp}fsdp_activation_checkpointing", repeats(plan), "stages[].memory"
    yield f"{AXES}dp_replicate_size", stage.dp_replicate, "stages[].dp_replicate"
    yield f"{AXES}dp_shard_size", stage.dp_shard, "stages[].dp / dp_replicate"
    yield f"{AXES}tp_size", stage.tp, "stages[].tp"


def repeats(plan: Plan) -> bool:
    """Whether any layer is run again whole."""
    return any(stage.num_full for stage in plan.stages)


def _trainer(subject: ExportSource) -> str:
    """A snippet: the arguments of a Trainer that belong to the layout."""
    plan = subject.plan
    stage, work = plan.stages[0], plan.workload
    # Under FSDP2 blocks are wrapped by fsdp_config: both at once would recompute twice.
    checkpointing = repeats(plan) and not stage.zero
    rows = [
        ("per_device_train_batch_size", stage.micro_batch, "stages[].micro_batch"),
        ("gradient_accumulation_steps", plan.num_micro_batches, "num_micro_batches"),
        ("bf16", work.precision is Precision.BF16, "workload.precision"),
        ("fp16", work.precision is Precision.FP16, "workload.precision"),
        ("optim", '"adamw_torch"', "workload.optimizer"),
        ("gradient_checkpointing", checkpointing, "stages[].memory"),
    ]
    lines = [
        *head(subject, "For your program: TrainingArguments(..., **TRAINING_ARGUMENTS)."),
        "TRAINING_ARGUMENTS = dict(",
        *(f"    {name}={value},  # {field}" for name, value, field in rows),
        ")",
        f"SEQ_LEN = {work.seq_len}  # workload.seq_len: of your samples",
    ]
    return "\n".join(lines) + "\n"


def recognises_accelerate(text: str) -> bool:
    """Whether a text has keys of accelerate's configuration."""
    keys = ("distributed_type:", "fsdp_config:", "parallelism_config:", "compute_environment:")
    return not text.lstrip().startswith("{") and any(f"\n{key}" in f"\n{text}" for key in keys)


READ: Final = frozenset(
    {
        "compute_environment", "distributed_type", "num_machines", "num_processes",
        "mixed_precision", "fsdp_config.fsdp_version", "fsdp_config.fsdp_reshard_after_forward",
        "fsdp_config.fsdp_auto_wrap_policy", "fsdp_config.fsdp_offload_params",
        "fsdp_config.fsdp_activation_checkpointing", f"{AXES}dp_replicate_size",
        f"{AXES}dp_shard_size", f"{AXES}tp_size",
    }
)  # fmt: skip
# What only says where processes start.
LAUNCH: Final = frozenset(
    {"machine_rank", "main_process_ip", "main_process_port", "main_training_function", "debug",
     "rdzv_backend", "same_network", "use_cpu", "downcast_bf16", "enable_cpu_affinity"}
)  # fmt: skip


def read_accelerate(text: str, path: str) -> Configuration:
    """The layout of a YAML file: everything but the batch and the length. Raises InputError."""
    document = parse_yaml(text.encode(), Path(path))
    if not isinstance(document, Document):
        raise InputError(f"{path} is no mapping of accelerate's keys.")
    keys = dict(leaves(document.data))
    divided = _divides(keys, path)
    copies = _count(keys, f"{AXES}dp_replicate_size", path)
    shard = _count(keys, f"{AXES}dp_shard_size", path)
    offload = float(keys.get("fsdp_config.fsdp_offload_params") is True and divided)
    repeats = keys.get("fsdp_config.fsdp_activation_checkpointing") is True
    return Configuration(
        knobs={
            "tp": _count(keys, f"{AXES}tp_size", path) or 1,
            "zero": _zero(keys, path) if divided else 0,
            "dp_replicate": copies or 1,
        },
        # Without FSDP the program itself switches it on, not the file.
        checkpoint=(REPEATS_ALL if repeats else KEEPS_ALL).value if divided else None,
        offload=Offload(weights=offload, grads=offload, optimizer=offload),
        precision=_precision(keys, path),
        num_gpus=_count(keys, "num_processes", path),
        dp=copies * shard if copies and shard else None,
        unmodelled=tuple(_unmodelled(keys)),
    )


def _divides(keys: Mapping[str, Any], path: str) -> bool:
    """Whether FSDP divides the states."""
    kind = str(keys.get("distributed_type", "NO"))
    if kind not in ("FSDP", "MULTI_GPU", "NO"):
        raise InputError(
            f"{path}: distributed_type {kind} is not read. Known: FSDP, MULTI_GPU, NO."
        )
    return kind == "FSDP"


def _count(keys: Mapping[str, Any], key: str, path: str) -> int | None:
    value = keys.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"{path}: {key} {value!r:.40} is no number of ranks.")
    return value


def _zero(keys: Mapping[str, Any], path: str) -> int:
    key = "fsdp_config.fsdp_reshard_after_forward"
    value = keys.get(key, True)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key} {value!r:.40} is neither true nor false (FSDP2).")
    return 3 if value else 2


def _precision(keys: Mapping[str, Any], path: str) -> Precision:
    # YAML reads a bare "no" as false.
    value = keys.get("mixed_precision", "no")
    word = "no" if value is False else value
    for precision, known in WORDS.items():
        if known == word:
            return precision
    raise InputError(
        f"{path}: mixed_precision {word!r:.40} is none of {', '.join(WORDS.values())}."
    )


def _unmodelled(keys: Mapping[str, Any]) -> Iterator[str]:
    yield from unread(keys, READ | LAUNCH)
    version = keys.get("fsdp_config.fsdp_version", 1)
    if version != 2 and keys.get("distributed_type") == "FSDP":
        yield f"fsdp_config.fsdp_version = {version} (predicted as 2)"
