"""accelerate: a YAML file for FSDP2, arguments of transformers' Trainer, a script; the inverse.

Keys: accelerate/commands/config/config_args.py of 1.15.0, TrainingArguments of transformers 5.23.0.
accelerate refuses unknown keys at the top of the file and passes over those below, so that nothing
is written that it does not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mist.documents import Document, parse_yaml
from mist.errors import InputError
from mist.export.deepspeed_json import beside
from mist.export.launcher_lines import head, node_script, nodes_of
from mist.export.setting_values import leaves, whole_at
from mist.export.target import (
    Configuration,
    ExportLoss,
    ExportSource,
    Expresses,
    Written,
    added,
    by_its_own_rules,
    refused,
    undivided_offload,
)
from mist.export.unread_settings import SettingKinds, unread, with_unread
from mist.export.yaml_lines import yaml_lines
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
    losses = [added("stages[].micro_batch", words)]
    if plan.stages[0].tp > 1:
        words = "accelerate 1.15 divides tensors with transformers 5.0; 5.6 and later are too new"
        losses.append(added("stages[].tp", words))
    return Written(
        files={
            CONFIG: "\n".join([*lines, *yaml_lines(_rows(plan))]) + "\n",
            "training_arguments.py": _trainer(subject),
            "launch.sh": script,
        },
        added=[*losses, *by_its_own_rules(plan)],
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


DEEPSPEED: Final = "deepspeed_config."
KINDS: Final = SettingKinds(
    read=frozenset(
        {
            "compute_environment", "distributed_type", "num_machines", "num_processes",
            "mixed_precision", "fsdp_config.fsdp_version", "fsdp_config.fsdp_sharding_strategy",
            "fsdp_config.fsdp_reshard_after_forward", "fsdp_config.fsdp_auto_wrap_policy",
            "fsdp_config.fsdp_offload_params", "fsdp_config.fsdp_activation_checkpointing",
            f"{AXES}dp_replicate_size", f"{AXES}dp_shard_size", f"{AXES}tp_size",
            f"{DEEPSPEED}zero_stage", f"{DEEPSPEED}deepspeed_config_file",
            f"{DEEPSPEED}gradient_accumulation_steps",
            "gradient_accumulation_steps",
        }
    ),
    # What only says where processes start, or how states are saved and read.
    untouched=(
        "machine_rank", "main_", "debug", "rdzv_", "same_network", "downcast_bf16", "gpu_ids",
        "enable_cpu_affinity", "tpu_", "fsdp_config.fsdp_state_dict", "fsdp_config.fsdp_sync_",
        "fsdp_config.fsdp_cpu_ram", "fsdp_config.fsdp_transformer_layer",
        "fsdp_config.fsdp_use_orig", f"{DEEPSPEED}zero3_", f"{DEEPSPEED}deepspeed_multinode",
        f"{DEEPSPEED}gradient_clipping",
    ),
    decisive={
        "use_cpu": ("false",),
        "tpu_use_cluster": ("false",),
        f"{DEEPSPEED}offload_optimizer_device": ("none", "cpu"),
        f"{DEEPSPEED}offload_param_device": ("none", "cpu"),
        f"{AXES}cp_size": ("1",),
        f"{AXES}sp_size": ("1",),
    },
)  # fmt: skip
# ZeRO level of FSDP1's strategies, by word and by number; the last two have a copy on each machine.
STRATEGIES: Final = {
    "FULL_SHARD": 3, "SHARD_GRAD_OP": 2, "NO_SHARD": 0, "HYBRID_SHARD": 3, "HYBRID_SHARD_ZERO2": 2,
}  # fmt: skip


def read_accelerate(text: str, path: str) -> Configuration:
    """The layout of a YAML file: everything but the batch and the length. Raises InputError."""
    document = parse_yaml(text.encode(), Path(path))
    if not isinstance(document, Document):
        raise InputError(f"{path} is no mapping of accelerate's keys.")
    keys = dict(leaves(document.data))
    kind = str(keys.get("distributed_type", "NO"))
    if kind not in READERS:
        known = ", ".join(READERS)
        raise InputError(f"{path}: distributed_type {kind} is not read. Known: {known}.")
    others = unread(keys, KINDS, text, path)
    said = with_unread(READERS[kind](keys, path), others)
    return replace(
        said,
        precision=_precision(keys, path),
        num_gpus=whole_at(keys, "num_processes", path),
    )


def _under_fsdp(keys: Mapping[str, Any], path: str) -> Configuration:
    section = fsdp_section(keys)
    zero, copied = fsdp_zero(section, path)
    copies = whole_at(keys, "num_machines", path) if copied else None
    copies = copies or whole_at(keys, f"{AXES}dp_replicate_size", path)
    shard = whole_at(keys, f"{AXES}dp_shard_size", path)
    offload = float(section.get("offload_params") is True)
    version = section.get("version", 1)
    return Configuration(
        knobs={
            "tp": whole_at(keys, f"{AXES}tp_size", path) or 1,
            "zero": zero,
            "dp_replicate": (copies or 1) if zero else 1,
        },
        checkpoint=fsdp_checkpoint(section),
        offload=Offload(weights=offload, grads=offload, optimizer=offload),
        dp=copies * shard if copies and shard else None,
        unmodelled=()
        if version == 2
        else (f"fsdp_config.fsdp_version = {version} (predicted as 2)",),
    )


def fsdp_section(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a section fsdp_config, without fsdp_, which some have and some have not."""
    prefix = "fsdp_config."
    found = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
    return {key.removeprefix("fsdp_"): value for key, value in found.items()}


def strategy_word(words: Sequence[str]) -> dict[str, Any]:
    """The strategy among the words of a key fsdp, as older files and options have it."""
    known = [word.upper() for word in words if word.upper() in STRATEGIES]
    return {"sharding_strategy": known[0]} if known else {}


def fsdp_zero(section: Mapping[str, Any], path: str) -> tuple[int, bool]:
    """The ZeRO level, and whether each machine has a copy of its own. Raises InputError."""
    stated = section.get("sharding_strategy") is not None
    key = "sharding_strategy" if stated else "reshard_after_forward"
    word = section.get(key)
    if word is None or (isinstance(word, bool) and key == "reshard_after_forward"):
        return (2 if word is False else 3), False
    numbered = {str(number): name for number, name in enumerate(STRATEGIES, start=1)}
    name = numbered.get(str(word), str(word).upper())
    if name not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise InputError(
            f"{path}: {key} {word!r:.40} is none of {known}; FSDP2 has true and false."
        )
    return STRATEGIES[name], "HYBRID" in name


def fsdp_checkpoint(section: Mapping[str, Any]) -> str | None:
    """The memory level; None where the program itself may switch it on, not the file."""
    repeats = section.get("activation_checkpointing")
    return None if repeats is None else (REPEATS_ALL if repeats is True else KEEPS_ALL).value


def _under_deepspeed(keys: Mapping[str, Any], path: str) -> Configuration:
    """Of the section deepspeed_config: a JSON that it names, or the keys themselves."""
    if file := keys.get(f"{DEEPSPEED}deepspeed_config_file"):
        said = beside(path, f"{DEEPSPEED}deepspeed_config_file", file)
    else:
        hosted = {
            name: float(keys.get(f"{DEEPSPEED}offload_{name}_device", "none") == "cpu")
            for name in ("optimizer", "param")
        }
        said = Configuration(
            knobs={"zero": _zero_stage(keys, path)},
            offload=Offload(optimizer=hosted["optimizer"], weights=hosted["param"]),
            num_micro_batches=whole_at(keys, f"{DEEPSPEED}gradient_accumulation_steps", path),
        )
    return replace(said, runtimes=("deepspeed-zero3",))


def _zero_stage(keys: Mapping[str, Any], path: str) -> int:
    value = keys.get(f"{DEEPSPEED}zero_stage", 2)
    if type(value) is not int or not 0 <= value <= 3:
        raise InputError(f"{path}: {DEEPSPEED}zero_stage {value!r:.40} is none of 0, 1, 2, 3.")
    return value


def _alone(keys: Mapping[str, Any], path: str) -> Configuration:
    """Whole states on every rank; the program itself switches recomputation on, not the file."""
    return Configuration(knobs={"tp": whole_at(keys, f"{AXES}tp_size", path) or 1, "zero": 0})


READERS: Final = {
    "FSDP": _under_fsdp,
    "DEEPSPEED": _under_deepspeed,
    "MULTI_GPU": _alone,
    "NO": _alone,
}


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
