"""Scripts that start a program of transformers' Trainer, beside accelerate's YAML.

Names: TrainingArguments of transformers 5.23.0; both spellings, with - and _. What divides the
states is said by an option that names a file (--deepspeed, --config_file of `accelerate launch`) or
by --fsdp; without them every rank has whole states.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from mist.documents import parse_json, text_of
from mist.errors import InputError
from mist.export.accelerate_yaml import (
    AXES,
    fsdp_checkpoint,
    fsdp_section,
    fsdp_zero,
    read_accelerate,
    recognises_accelerate,
    strategy_word,
)
from mist.export.command_words import launched, options_of
from mist.export.deepspeed_json import beside
from mist.export.llamafactory_yaml import KIND, STAGE_KEY
from mist.export.setting_lines import read_lines
from mist.export.setting_values import leaves, whole_at
from mist.export.target import Configuration
from mist.export.unread_settings import ADAMW, NEVER, SettingKinds, unread, with_unread
from mist.files import file_beside, read_bytes
from mist.plans.memory_levels import KEEPS_ALL, REPEATS_ALL
from mist.plans.plan import Offload
from mist.plans.workload import Precision

EACH: Final = "per_device_train_batch_size"
LENGTHS: Final = ("max_length", "max_seq_length", "model_max_length", "block_size", "cutoff_len")
STARTED: Final = re.compile(rf"--{EACH.replace('_', '[-_]')}\b")
KINDS: Final = SettingKinds(
    read=frozenset(
        {EACH, "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "fp16", "fsdp",
         "fsdp_config", "deepspeed", "config_file", "model_name_or_path", "nproc_per_node",
         "nnodes", "num_processes", "num_machines", "do_train", *LENGTHS}
    ),
    untouched=(
        "learning_rate", "lr_scheduler", "warmup", "weight_decay", "adam_", "max_grad_norm", "seed",
        "num_train_epochs", "max_steps", "logging_", "save_", "eval", "do_eval", "per_device_eval",
        "output_dir", "overwrite_", "report_to", "run_name", "dataset", "data", "train_file",
        "validation_", "preprocessing_", "tokenizer", "template", "push_to_hub", "hub_", "resume_",
        "ddp_timeout", "remove_unused", "group_by_length", "master_", "node_rank", "machine_rank",
        "main_process", "rdzv_", "fsdp_transformer_layer", "lora_alpha", "lora_dropout",
        "trust_remote", "use_fast", "streaming", "load_best", "metric_",
        "tf32", "plot_loss", "max_samples", "report", "local_rank",
    ),
    decisive={
        "finetuning_type": (KIND,),
        STAGE_KEY: ("pt", "sft"),
        **dict.fromkeys(("use_peft", "load_in_4bit", "load_in_8bit", "lora"), ("false",)),
        **dict.fromkeys(("lora_r", "lora_rank", "lora_target", "quantization_bit"), NEVER),
    },
    usual={"optim": ADAMW},
    sign=" ",
)  # fmt: skip


NAMES: Final = {
    f"{AXES}tp_size": "tp",
    "fsdp_config.fsdp_reshard_after_forward": "zero",
    "--deepspeed": "zero",
    "--fsdp": "zero",
    "zero_stage": "zero",
    f"{AXES}dp_shard_size": "dp",
    f"{AXES}dp_replicate_size": "dp_replicate",
    EACH: "micro_batch",
    "gradient_accumulation_steps": "num_micro_batches",
    **dict.fromkeys(LENGTHS, "seq"),
    "gradient_checkpointing": "checkpoint",
    "fsdp_config.fsdp_activation_checkpointing": "checkpoint",
    "fsdp_config.fsdp_offload_params": "offload",
    "mixed_precision": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "num_processes": "gpus",
    "nproc_per_node": "gpus",
}
"""Which option of `mist check` a setting answers, in scripts and in accelerate's YAML."""


def recognises_trainer(text: str) -> bool:
    """Whether a text is accelerate's YAML, or starts a program with options of a Trainer."""
    return recognises_accelerate(text) or bool(STARTED.search(text))


def read_trainer(text: str, path: str) -> Configuration:
    """The layout of either. Raises InputError naming a key or an option."""
    return _of_script(text, path) if STARTED.search(text) else read_accelerate(text, path)


def _of_script(text: str, path: str) -> Configuration:
    options = options_of(text, path)
    words = {name.removeprefix("--").replace("-", "_"): v for name, v in options.items()}
    settings: dict[str, Any] = {name: _value(values) for name, values in words.items()}
    others = unread(settings, KINDS, text, path)
    divided = with_unread(_divided(settings, path), others)
    repeats = _is_on(settings, "gradient_checkpointing") or divided.checkpoint == REPEATS_ALL
    return replace(
        divided,
        knobs={**divided.knobs, "micro_batch": whole_at(settings, EACH, path) or 8},
        checkpoint=(REPEATS_ALL if repeats else KEEPS_ALL).value,
        seq_len=next((whole_at(settings, n, path) for n in LENGTHS if n in settings), None),
        model=_first_word(settings, "model_name_or_path"),
        precision=_precision(settings) or divided.precision or Precision.FP32,
        num_micro_batches=whole_at(settings, "gradient_accumulation_steps", path) or 1,
        launched=launched(options) or divided.num_gpus,
        num_gpus=None,
        runtimes=divided.runtimes or ("torch",),
    )


def _value(values: tuple[str, ...]) -> int | str:
    """The values of an option: a number, or their words; of those behind it, the program's too."""
    if values and re.fullmatch(r"\d{1,15}", values[0]):
        return int(values[0])
    return " ".join(values)


def _first_word(settings: Mapping[str, Any], name: str) -> str | None:
    return str(settings[name]).partition(" ")[0] if name in settings else None


def _is_on(settings: Mapping[str, Any], name: str) -> bool:
    """A flag, or what is said to be true."""
    word = _first_word(settings, name)
    return word is not None and word.lower() not in ("false", "no")


def _precision(settings: Mapping[str, Any]) -> Precision | None:
    return next((p for p in (Precision.BF16, Precision.FP16) if _is_on(settings, p.value)), None)


def _divided(settings: Mapping[str, Any], path: str) -> Configuration:
    """What divides the states. Raises InputError for a file that is not there."""
    if name := settings.get("deepspeed"):
        return replace(beside(path, "--deepspeed", name), runtimes=("deepspeed-zero3",))
    if name := _first_word(settings, "config_file"):
        file = file_beside(path, "--config_file", name)
        return read_lines(read_accelerate, text_of(read_bytes(file), file), str(file))
    if settings.get("fsdp"):
        return _under_fsdp(settings, path)
    return Configuration(knobs={"zero": 0})


def _under_fsdp(settings: Mapping[str, Any], path: str) -> Configuration:
    words = str(settings["fsdp"]).split()
    section: dict[str, Any] = strategy_word(words)
    if name := settings.get("fsdp_config"):
        file = file_beside(path, "--fsdp_config", name)
        data = parse_json(read_bytes(file), file)
        if not isinstance(data, dict):
            raise InputError(f"{file} is no JSON object.")
        section |= fsdp_section({f"fsdp_config.{key}": value for key, value in leaves(data)})
    zero, copied = fsdp_zero(section, path)
    if copied:
        raise InputError(f"{path}: --fsdp {' '.join(words)}: copies on each machine are not read.")
    away = float("offload" in words or section.get("offload_params") is True)
    return Configuration(
        knobs={"zero": zero},
        checkpoint=fsdp_checkpoint(section),
        offload=Offload(weights=away, grads=away, optimizer=away),
    )
