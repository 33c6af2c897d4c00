"""axolotl: a YAML file for FSDP2 and a script that trains with it; the inverse.

Keys: axolotl/utils/schemas/config.py and fsdp.py of 0.19.0. axolotl passes over keys that it does
not know, so that nothing is written that it does not read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mist.documents import Document, parse_yaml
from mist.errors import InputError
from mist.export.accelerate_yaml import repeats, under_fsdp2
from mist.export.deepspeed_json import leaves
from mist.export.launcher_lines import head, launch_script
from mist.export.target import Configuration, ExportSource, Written, added
from mist.export.yaml_lines import unread, whole_at, yaml_lines
from mist.plans.memory_levels import KEEPS_ALL, REPEATS_ALL
from mist.plans.plan import Offload
from mist.plans.workload import Precision

CONFIG: Final = "axolotl.yaml"
AXOLOTL: Final = under_fsdp2("axolotl")


def write_axolotl(subject: ExportSource) -> Written:
    """The YAML file and a script."""
    lines = head(subject, "A configuration of axolotl (axolotl train axolotl.yaml).")
    script = launch_script(
        subject,
        "Starts axolotl with the configuration.",
        ["-m", "axolotl.cli.train", f'"$(dirname "$0")/{CONFIG}"', '"$@"'],
    )
    words = "base_model is the plan's model source; datasets, learning rate and output are yours"
    return Written(
        files={
            CONFIG: "\n".join([*lines, *yaml_lines(_rows(subject))]) + "\n",
            "launch.sh": script,
        },
        added=[added("model", words)],
    )


def _rows(subject: ExportSource) -> Iterator[tuple[str, Any, str]]:
    plan = subject.plan
    stage, work = plan.stages[0], plan.workload
    yield "base_model", plan.model.source, "model.source"
    yield "sequence_len", work.seq_len, "workload.seq_len"
    yield "micro_batch_size", stage.micro_batch, "stages[].micro_batch"
    yield "gradient_accumulation_steps", plan.num_micro_batches, "num_micro_batches"
    yield "bf16", work.precision is Precision.BF16, "workload.precision"
    yield "fp16", work.precision is Precision.FP16, "workload.precision"
    yield "optimizer", "adamw_torch", "workload.optimizer"
    if work.attention == "flash":
        yield "attn_implementation", "flash_attention_2", "workload.attention"
    # Under FSDP2 blocks are wrapped by fsdp_config: both at once would recompute twice.
    yield "gradient_checkpointing", repeats(plan) and not stage.zero, "stages[].memory"
    if not stage.zero:
        return
    yield "dp_replicate_size", stage.dp_replicate, "stages[].dp_replicate"
    yield "dp_shard_size", stage.dp_shard, "stages[].dp / dp_replicate"
    yield "tensor_parallel_size", stage.tp, "stages[].tp"
    yield "fsdp_version", 2, "stages[].zero"
    fsdp = "fsdp_config."
    yield f"{fsdp}reshard_after_forward", stage.zero == 3, "stages[].zero"
    yield f"{fsdp}auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "stages[].layers"
    yield f"{fsdp}offload_params", stage.offload.weights == 1.0, "stages[].offload"
    yield f"{fsdp}activation_checkpointing", repeats(plan), "stages[].memory"


def recognises_axolotl(text: str) -> bool:
    """Whether a text has keys that axolotl alone has."""
    return all(f"\n{key}:" in f"\n{text}" for key in ("base_model", "micro_batch_size"))


READ: Final = frozenset(
    {
        "base_model", "sequence_len", "micro_batch_size", "gradient_accumulation_steps", "bf16",
        "fp16", "optimizer", "attn_implementation", "gradient_checkpointing", "dp_replicate_size",
        "dp_shard_size", "tensor_parallel_size", "fsdp_version",
        "fsdp_config.reshard_after_forward", "fsdp_config.auto_wrap_policy",
        "fsdp_config.offload_params", "fsdp_config.activation_checkpointing",
    }
)  # fmt: skip
COUNTS: Final = (
    "sequence_len", "micro_batch_size", "gradient_accumulation_steps", "dp_replicate_size",
    "dp_shard_size", "tensor_parallel_size",
)  # fmt: skip
UNTOUCHED: Final = (
    "datasets", "dataset_", "output_dir", "learning_rate", "lr_scheduler", "warmup", "wandb",
    "num_epochs", "max_steps", "saves_per_epoch", "save_", "eval", "val_set_size", "logging_steps",
    "seed", "special_tokens", "tokenizer", "weight_decay", "chat_template", "strict", "resume_",
    "tf32", "model_type",
)  # fmt: skip
"""Beginnings of keys on data, logs and learning rates: they change neither time nor memory."""


def read_axolotl(text: str, path: str) -> Configuration:
    """The layout of a YAML file. Raises InputError naming a key."""
    document = parse_yaml(text.encode(), Path(path))
    if not isinstance(document, Document):
        raise InputError(f"{path} is no mapping of axolotl's keys.")
    keys = dict(leaves(document.data))
    numbers = {key: whole_at(keys, key, path) for key in COUNTS}
    tp, copies = numbers["tensor_parallel_size"] or 1, numbers["dp_replicate_size"] or 1
    each, steps = numbers["micro_batch_size"] or 1, numbers["gradient_accumulation_steps"] or 1
    shard = numbers["dp_shard_size"]
    dp = copies * shard if shard else None
    divided = any(key.startswith("fsdp") for key in keys)
    offload = float(keys.get("fsdp_config.offload_params") is True)
    said = Configuration(
        knobs={"tp": tp, "zero": _zero(keys) if divided else 0, "dp_replicate": copies}
        | {"micro_batch": each},
        checkpoint=(REPEATS_ALL if _checkpoints(keys) else KEEPS_ALL).value,
        offload=Offload(weights=offload, grads=offload, optimizer=offload),
        seq_len=numbers["sequence_len"],
        precision=_precision(keys),
        num_micro_batches=steps,
        unmodelled=tuple(_unmodelled(keys)),
    )
    # Without the sizes of the meshes neither ranks nor the batch follow from the file.
    if dp is None:
        return said
    return replace(said, dp=dp, num_gpus=dp * tp, global_batch=each * steps * dp)


def _zero(keys: Mapping[str, Any]) -> int:
    return 3 if keys.get("fsdp_config.reshard_after_forward", True) is not False else 2


def _checkpoints(keys: Mapping[str, Any]) -> bool:
    words = ("gradient_checkpointing", "fsdp_config.activation_checkpointing")
    return any(bool(keys.get(word)) for word in words)


def _precision(keys: Mapping[str, Any]) -> Precision:
    if keys.get("bf16") not in (None, False, "false"):
        return Precision.BF16
    return Precision.FP16 if keys.get("fp16") is True else Precision.FP32


def _unmodelled(keys: Mapping[str, Any]) -> Iterator[str]:
    yield from unread(keys, READ, UNTOUCHED)
    if any(key.startswith("fsdp") for key in keys) and keys.get("fsdp_version", 1) != 2:
        yield f"fsdp_version = {keys.get('fsdp_version', 1)} (predicted as 2)"
