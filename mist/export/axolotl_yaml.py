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
from mist.export.accelerate_yaml import (
    fsdp_checkpoint,
    fsdp_section,
    fsdp_zero,
    repeats,
    strategy_word,
    under_fsdp2,
)
from mist.export.deepspeed_json import beside
from mist.export.launcher_lines import head, launch_script
from mist.export.setting_values import leaves, whole_at
from mist.export.target import Configuration, ExportSource, Written, added, by_its_own_rules
from mist.export.unread_settings import ADAMW, SettingKinds, unread, with_unread
from mist.export.yaml_lines import yaml_lines
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
        added=[added("model", words), *by_its_own_rules(subject.plan)],
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


FSDP: Final = (
    "version", "reshard_after_forward", "sharding_strategy", "auto_wrap_policy", "offload_params",
    "activation_checkpointing",
)  # fmt: skip
SAVING: Final = ("state_dict", "sync_module", "cpu_ram", "transformer_layer", "use_orig", "final_")
COUNTS: Final = (
    "sequence_len", "micro_batch_size", "gradient_accumulation_steps", "dp_replicate_size",
    "dp_shard_size", "tensor_parallel_size",
)  # fmt: skip
KINDS: Final = SettingKinds(
    read=frozenset(
        {
            "base_model", "bf16", "fp16", "attn_implementation", "flash_attention",
            "gradient_checkpointing", "fsdp", "fsdp_version", "deepspeed", *COUNTS,
            *(f"fsdp_config.{prefix}{name}" for prefix in ("", "fsdp_") for name in FSDP),
        }
    ),
    untouched=(
        "datasets", "dataset_", "output_dir", "learning_rate", "lr_scheduler", "warmup", "wandb",
        "num_epochs", "max_steps", "saves_per_epoch", "save_", "eval", "val_set_size", "seed",
        "logging_steps", "special_tokens", "tokenizer", "weight_decay", "chat_template", "strict",
        "resume_", "tf32", "model_type", "test_datasets", "auto_resume", "local_rank", "debug",
        "train_on_inputs", "gradient_checkpointing_kwargs", "adam_", "max_grad_norm", "hub_",
        "trust_remote", "eot_tokens", "cosine_", "lora_", "is_llama_derived", "pretraining_dataset",
        *(f"fsdp_config.{prefix}{name}" for prefix in ("", "fsdp_") for name in SAVING),
    ),
    decisive={
        "adapter": ("none", ""),
        "load_in_8bit": ("false",),
        "load_in_4bit": ("false",),
        "unfrozen_parameters": ("none", "[]"),
        "rl": ("none", ""),
        "context_parallel_size": ("1",),
        "sequence_parallel_degree": ("1",),
        "expert_parallel_size": ("1",),
        "tensor_parallel": ("none", "false"),
    },
    usual={"optimizer": ADAMW},
)  # fmt: skip


NAMES: Final = {
    "tensor_parallel_size": "tp",
    "fsdp_config.reshard_after_forward": "zero",
    "deepspeed": "zero",
    "dp_shard_size": "dp",
    "dp_replicate_size": "dp_replicate",
    "micro_batch_size": "micro_batch",
    "gradient_accumulation_steps": "num_micro_batches",
    "sequence_len": "seq",
    "gradient_checkpointing": "checkpoint",
    "fsdp_config.offload_params": "offload",
    "fp16": "precision",
    "bf16": "precision",
}


def read_axolotl(text: str, path: str) -> Configuration:
    """The layout of a YAML file. Raises InputError naming a key."""
    document = parse_yaml(text.encode(), Path(path))
    if not isinstance(document, Document):
        raise InputError(f"{path} is no mapping of axolotl's keys.")
    # A key without a value is no setting.
    keys = {key: value for key, value in leaves(document.data) if value is not None}
    others = unread(keys, KINDS, text, path)
    numbers = {key: whole_at(keys, key, path) for key in COUNTS}
    said = with_unread(_divided(keys, numbers, path), others)
    return replace(
        said,
        knobs={**said.knobs, "micro_batch": numbers["micro_batch_size"] or 1},
        seq_len=numbers["sequence_len"],
        model=str(keys["base_model"]),
        precision=_precision(keys),
        num_micro_batches=numbers["gradient_accumulation_steps"] or 1,
    )


def _divided(
    keys: Mapping[str, Any], numbers: Mapping[str, int | None], path: str
) -> Configuration:
    """How the states are divided: by a DeepSpeed JSON, by FSDP, or not at all."""
    level = (REPEATS_ALL if keys.get("gradient_checkpointing") else KEEPS_ALL).value
    if keys.get("deepspeed"):
        said = beside(path, "deepspeed", keys["deepspeed"])
        return replace(said, checkpoint=level, runtimes=("deepspeed-zero3",))
    tp, copies = numbers["tensor_parallel_size"] or 1, numbers["dp_replicate_size"] or 1
    if not any(key.startswith("fsdp") for key in keys):
        said = Configuration(knobs={"tp": tp, "zero": 0, "dp_replicate": 1}, checkpoint=level)
    else:
        said = _under_fsdp(keys, {"tp": tp, "dp_replicate": copies}, level, path)
    if (shard := numbers["dp_shard_size"]) is None:
        return said  # the number of ranks does not follow from the file
    return replace(said, dp=copies * shard, num_gpus=copies * shard * tp)


def _under_fsdp(
    keys: Mapping[str, Any], knobs: Mapping[str, int], level: str, path: str
) -> Configuration:
    section = strategy_word(_words(keys.get("fsdp"))) | dict(fsdp_section(keys))
    zero, copied = fsdp_zero(section, path)
    if copied and "dp_replicate_size" not in keys:
        raise InputError(f"{path}: a hybrid strategy needs dp_replicate_size, its copies. Add it.")
    version = keys.get("fsdp_version", section.get("version", 1))
    away = section.get("offload_params") is True or "offload" in _words(keys.get("fsdp"))
    return Configuration(
        knobs={**knobs, "zero": zero} | ({} if zero else {"dp_replicate": 1}),
        checkpoint=REPEATS_ALL.value if fsdp_checkpoint(section) == REPEATS_ALL else level,
        offload=Offload(weights=float(away), grads=float(away), optimizer=float(away)),
        unmodelled=() if version == 2 else (f"fsdp_version = {version} (predicted as 2)",),
    )


def _words(value: object) -> list[str]:
    """The words of a list or of a text."""
    return [str(each) for each in value] if isinstance(value, list) else str(value or "").split()


def _precision(keys: Mapping[str, Any]) -> Precision:
    if keys.get("bf16") not in (None, False, "false"):
        return Precision.BF16
    return Precision.FP16 if keys.get("fp16") is True else Precision.FP32
