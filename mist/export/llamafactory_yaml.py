"""LLaMA-Factory: a YAML file that names a DeepSpeed JSON, and a script; the inverse.

Keys: src/llamafactory/hparams of 0.9.5, and TrainingArguments of transformers. The states are
divided by DeepSpeed: what its JSON can say this target can, but for tensor parallelism.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mist.documents import Document, parse_yaml
from mist.errors import InputError
from mist.export.accelerate_yaml import repeats
from mist.export.deepspeed_json import CONFIG as DEEPSPEED_FILE
from mist.export.deepspeed_json import (
    DEEPSPEED,
    MICRO,
    beside,
    write_deepspeed,
)
from mist.export.launcher_lines import head, node_script, nodes_of
from mist.export.setting_values import whole_at
from mist.export.target import Configuration, ExportLoss, ExportSource, Written, added, refused
from mist.export.unread_settings import ADAMW, SettingKinds, unread, with_unread
from mist.export.yaml_lines import yaml_lines
from mist.plans.memory_levels import KEEPS_ALL, REPEATS_ALL
from mist.plans.plan import Plan
from mist.plans.workload import Precision

CONFIG: Final = "llamafactory.yaml"
PRETRAINING: Final = "pt, full"  # of all parameters, as the keys stage and finetuning_type say
STAGE, KIND = PRETRAINING.split(", ")
EACH: Final = "per_device_train_batch_size"
ACCUMULATED: Final = "gradient_accumulation_steps"
STAGE_KEY: Final = "stage"


def _faults(plan: Plan) -> list[ExportLoss]:
    losses = list(DEEPSPEED.faults(plan))
    if (tp := plan.stages[0].tp) > 1:
        losses.append(refused("stages[].tp", f"{tp}; llamafactory trains each model on one rank"))
    return losses


LLAMAFACTORY: Final = replace(DEEPSPEED, faults=_faults)


def write_llamafactory(subject: ExportSource) -> Written:
    """The YAML file, the DeepSpeed JSON that it names, and a script."""
    cluster = subject.plan.cluster
    lines = head(subject, "A configuration of LLaMA-Factory (llamafactory-cli train FILE).")
    command = [
        "set -euo pipefail",
        f'export FORCE_TORCHRUN=1 NNODES="${{NNODES:-{nodes_of(cluster)}}}"',
        f"export NPROC_PER_NODE={min(cluster.gpus_per_node, cluster.num_gpus)}",
        'export NODE_RANK="${RANK_OF_NODE:-0}" MASTER_ADDR="${HEAD:-localhost}"',
        f'exec llamafactory-cli train "$(dirname "$0")/{CONFIG}" "$@"',
    ]
    words = "model_name_or_path is the plan's model source; dataset, template and output are yours"
    return Written(
        files={
            CONFIG: "\n".join([*lines, *yaml_lines(_rows(subject))]) + "\n",
            DEEPSPEED_FILE: write_deepspeed(subject).files[DEEPSPEED_FILE],
            "launch.sh": node_script(subject, "Starts LLaMA-Factory.", command),
        },
        added=[added("model", words)],
    )


def _rows(subject: ExportSource) -> Iterator[tuple[str, Any, str]]:
    plan = subject.plan
    stage, work = plan.stages[0], plan.workload
    yield "model_name_or_path", plan.model.source, "model.source"
    yield "stage", STAGE, "workload"
    yield "do_train", True, "workload"
    yield "finetuning_type", KIND, "workload: all parameters are trained"
    yield "cutoff_len", work.seq_len, "workload.seq_len"
    yield EACH, stage.micro_batch, "stages[].micro_batch"
    yield ACCUMULATED, plan.num_micro_batches, "num_micro_batches"
    yield "bf16", work.precision is Precision.BF16, "workload.precision"
    yield "fp16", work.precision is Precision.FP16, "workload.precision"
    yield "optim", "adamw_torch", "workload.optimizer"
    yield "flash_attn", "fa2" if work.attention == "flash" else "disabled", "workload.attention"
    yield "disable_gradient_checkpointing", not repeats(plan), "stages[].memory"
    yield "deepspeed", DEEPSPEED_FILE, "stages[].zero, stages[].offload"


def recognises_llamafactory(text: str) -> bool:
    """Whether a text has keys that LLaMA-Factory alone has."""
    return all(f"\n{key}:" in f"\n{text}" for key in ("model_name_or_path", "finetuning_type"))


READ: Final = frozenset(
    {
        "model_name_or_path", "do_train", "finetuning_type", "cutoff_len", EACH,
        ACCUMULATED, "bf16", "fp16", "flash_attn", "disable_gradient_checkpointing",
        "deepspeed",
    }
)  # fmt: skip
KINDS: Final = SettingKinds(
    read=READ,
    untouched=(
    "dataset", "template", "output_dir", "learning_rate", "lr_scheduler", "warmup", "logging_steps",
    "save_", "num_train_epochs", "max_steps", "overwrite_", "preprocessing_", "dataloader_",
    "plot_loss", "report_to", "val_size", "eval", "per_device_eval", "seed", "max_samples",
    "trust_remote_code", "use_fast", "max_grad_norm", "push_to_hub", "adam_",
    "ddp_timeout", "resume_", "weight_decay", "run_name", "hub_",
    ),
    decisive={
        STAGE_KEY: ("pt", "sft"),
        "quantization_bit": ("none",),
        **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_muon"), ("false",)),
        **dict.fromkeys(("use_adam_mini", "freeze_vision_tower"), ("false",)),
        **dict.fromkeys(("train_mm_proj_only", "pure_bf16"), ("false",)),
        **dict.fromkeys(("upcast_layernorm", "sequence_parallel_size"), ("false", "1")),
    },
    # Checkpointing is switched off by a key of its own alone.
    usual={"optim": ADAMW, "gradient_checkpointing": ("true",)},
)  # fmt: skip


NAMES: Final = {
    "deepspeed": "zero",
    EACH: "micro_batch",
    ACCUMULATED: "num_micro_batches",
    "cutoff_len": "seq",
    "disable_gradient_checkpointing": "checkpoint",
    "fp16": "precision",
    "bf16": "precision",
}


def read_llamafactory(text: str, path: str) -> Configuration:
    """The layout of a YAML file and of the JSON that it names. Raises InputError naming a key."""
    document = parse_yaml(text.encode(), Path(path))
    if not isinstance(document, Document):
        raise InputError(f"{path} is no mapping of LLaMA-Factory's keys.")
    keys = dict(document.data)
    kind = keys.get("finetuning_type", "lora")
    if kind != KIND:
        raise InputError(
            f"{path}: finetuning_type {kind!r:.40}: only full training is predicted. Try {KIND}."
        )
    others = unread(keys, KINDS, text, path)
    divided = with_unread(_deepspeed(keys, path), others)
    each = whole_at(keys, EACH, path) or 8  # the default of transformers
    # In LLaMA-Factory checkpointing is on unless it is switched off.
    level = KEEPS_ALL if keys.get("disable_gradient_checkpointing") is True else REPEATS_ALL
    return replace(
        divided,
        knobs={**divided.knobs, "micro_batch": each},
        checkpoint=level.value,
        seq_len=whole_at(keys, "cutoff_len", path),
        model=str(keys["model_name_or_path"]),
        precision=_precision(keys),
        num_micro_batches=whole_at(keys, ACCUMULATED, path) or 1,
    )


def _deepspeed(keys: Mapping[str, Any], path: str) -> Configuration:
    """What the DeepSpeed JSON says; without one nothing is divided. Raises InputError."""
    name = keys.get("deepspeed")
    if name is None:
        return Configuration(knobs={"zero": 0})
    said = beside(path, "deepspeed", name)
    each = said.knobs.get("micro_batch", whole_at(keys, EACH, path))
    if each != whole_at(keys, EACH, path):
        raise InputError(f"{path}: {EACH} {keys.get(EACH)}, but {name} says {MICRO} {each}.")
    return said


def _precision(keys: Mapping[str, Any]) -> Precision:
    if keys.get("bf16") is True:
        return Precision.BF16
    return Precision.FP16 if keys.get("fp16") is True else Precision.FP32
