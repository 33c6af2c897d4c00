"""DeepSpeed: a JSON configuration, a script that starts a training program with it; the inverse.

Keys: deepspeed/runtime/config.py and zero/config.py of 0.19.8. JSON has no comments: the fields of
the plan stand under the key "mist export", which DeepSpeed passes over.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mist.documents import parse_json, text_of
from mist.errors import InputError
from mist.export.launcher_lines import launch_script
from mist.export.setting_lines import read_lines
from mist.export.setting_values import leaves, whole_at
from mist.export.target import (
    MARK,
    Configuration,
    ExportLoss,
    ExportSource,
    Expresses,
    Written,
    added,
    refused,
)
from mist.export.unread_settings import SettingKinds, unread
from mist.files import file_beside, read_bytes
from mist.plans.plan import Offload, Plan
from mist.plans.workload import Precision

CONFIG: Final = "deepspeed.json"
BATCH: Final = "train_batch_size"
MICRO: Final = "train_micro_batch_size_per_gpu"
STEPS: Final = "gradient_accumulation_steps"


def _faults(plan: Plan) -> list[ExportLoss]:
    """Combinations that DeepSpeed refuses when it starts, or takes without doing them."""
    stage, losses = plan.stages[0], []
    if stage.tp > 1 and stage.zero > 2:
        words = f"{stage.tp} at ZeRO-{stage.zero}; deepspeed divides tensors up to ZeRO-2"
        losses.append(refused("stages[].tp", words))
    if stage.offload.weights and (stage.zero < 3 or not stage.offload.optimizer):
        words = "deepspeed offloads weights at ZeRO-3, together with the optimizer"
        losses.append(refused("stages[].offload.weights", words))
    if stage.offload.weights not in (0.0, 1.0):
        words = f"{stage.offload.weights:g}; deepspeed offloads all weights or none"
        losses.append(refused("stages[].offload.weights", words))
    if stage.offload.grads:
        words = f"{stage.offload.grads:g}; gradients go where the optimizer is"
        losses.append(refused("stages[].offload.grads", words))
    if stage.offload.optimizer and not stage.zero:
        losses.append(refused("stages[].offload.optimizer", "deepspeed needs ZeRO-1 or more"))
    return losses


DEEPSPEED: Final = Expresses(
    zero={0: 0, 1: 1, 2: 2, 3: 3},
    hosted=frozenset({"weights", "optimizer", "grads"}),
    shares_from=3,
    faults=_faults,
)


def write_deepspeed(subject: ExportSource) -> Written:
    """The JSON file and a script."""
    plan = subject.plan
    rows = list(_rows(plan))
    document: dict[str, Any] = {MARK: {key: field for key, _, field in rows}}
    for key, value, _ in rows:
        place = document
        *above, last = key.split(".")
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    words = "the model, the data and --seq are those of your program: give its path to launch.sh"
    losses = [added("model", words)]
    if any(stage.num_full for stage in plan.stages):
        words = "model.gradient_checkpointing_enable() in your program; JSON cannot switch it on"
        losses.append(added("stages[].memory", words))
    script = launch_script(
        subject,
        "Starts a program that hands the JSON to deepspeed.initialize: launch.sh train.py ...",
        ['"$@"', "--deepspeed_config", f'"$(dirname "$0")/{CONFIG}"'],
    )
    text = json.dumps(document, indent=2) + "\n"
    return Written(files={CONFIG: text, "launch.sh": script}, added=losses)


def _rows(plan: Plan) -> Iterator[tuple[str, Any, str]]:
    """Each key, its value and the field of the plan."""
    stage, work = plan.stages[0], plan.workload
    yield BATCH, work.global_batch, "workload.global_batch"
    yield MICRO, stage.micro_batch, "stages[].micro_batch"
    yield STEPS, plan.num_micro_batches, "num_micro_batches"
    yield "bf16.enabled", work.precision is Precision.BF16, "workload.precision"
    yield "fp16.enabled", work.precision is Precision.FP16, "workload.precision"
    yield "optimizer.type", "AdamW", "workload.optimizer"
    yield "zero_optimization.stage", stage.zero, "stages[].zero"
    yield "zero_optimization.overlap_comm", True, "stages[].zero"
    if stage.tp > 1:
        yield "tensor_parallel.autotp_size", stage.tp, "stages[].tp"
    field = "stages[].offload.optimizer"
    if stage.offload.optimizer:
        yield "zero_optimization.offload_optimizer.device", "cpu", field
        yield "zero_optimization.offload_optimizer.pin_memory", True, field
        if stage.zero > 2:
            yield "zero_optimization.offload_optimizer.ratio", stage.offload.optimizer, field
    if stage.offload.weights:
        yield "zero_optimization.offload_param.device", "cpu", "stages[].offload.weights"


def recognises_deepspeed(text: str) -> bool:
    """Whether a text is JSON with a key of DeepSpeed's batch or ZeRO."""
    keys = (BATCH, MICRO, "zero_optimization")
    return text.lstrip().startswith("{") and any(f'"{key}"' in text for key in keys)


READ: Final = frozenset(
    {
        BATCH, MICRO, STEPS, "bf16.enabled", "fp16.enabled",
        "zero_optimization.stage", "zero_optimization.overlap_comm", "tensor_parallel.autotp_size",
        "zero_optimization.offload_optimizer.ratio",
        "zero_optimization.offload_optimizer.pin_memory",
    }
)  # fmt: skip
KINDS: Final = SettingKinds(
    read=READ,
    untouched=(
        "optimizer.params", "scheduler", "gradient_clipping", "steps_per_print", "wall_clock",
        "fp16.", "bf16.", "zero_allow_untested", "comms_logger", "tensorboard", "wandb", "csv_",
        "comms_config", "monitor_config", "flops_profiler", "dump_state", "seed", "checkpoint.",
        "zero_force_ds", "prescale_",
        "zero_optimization.contiguous_gradients", "zero_optimization.offload_param.pin_memory",
        "zero_optimization.stage3_gather_16bit", "zero_optimization.gather_16bit",
    ),
    decisive={
        "zero_optimization.offload_optimizer.device": ("none", "cpu"),
        "zero_optimization.offload_param.device": ("none", "cpu"),
        "zero_optimization.zero_hpz_partition_size": ("1",),
        "zero_optimization.mics_shard_size": ("-1",),
        "sequence_parallel_size": ("1",),
        "sequence_parallel.size": ("1",),
        "expert_parallel.autoep_size": ("1",),
        "optimizer.type": ("adam", "adamw", "fusedadam", "cpuadam", "deepspeedcpuadam"),
    },
)  # fmt: skip


NAMES: Final = {
    "tensor_parallel.autotp_size": "tp",
    "zero_optimization.stage": "zero",
    MICRO: "micro_batch",
    BATCH: "global_batch",
    STEPS: "num_micro_batches",
    "zero_optimization.offload_optimizer.device": "offload",
    "zero_optimization.offload_param.device": "offload",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
}


def read_deepspeed(text: str, path: str) -> Configuration:
    """The layout of a JSON configuration. Raises InputError naming a key.

    "auto" is a value that its trainer sets: such a key says nothing, as one that is missing.
    """
    data = parse_json(text.encode(), Path(path))
    if not isinstance(data, dict):
        raise InputError(f"{path} is no JSON object.")
    data.pop(MARK, None)
    stated = dict(leaves(data))
    keys = {key: value for key, value in stated.items() if value != "auto"}
    others = unread(keys, KINDS, text, path)
    zero = whole_at(keys, "zero_optimization.stage", path, least=0)
    hosted = keys.get("zero_optimization.offload_optimizer.device", "none") != "none"
    weights = keys.get("zero_optimization.offload_param.device", "none") != "none"
    ratio = keys.get("zero_optimization.offload_optimizer.ratio", 1.0)
    if not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise InputError(f"{path}: zero_optimization.offload_optimizer.ratio {ratio} is no ratio.")
    knobs = {
        "tp": whole_at(keys, "tensor_parallel.autotp_size", path, least=0) or 1,
        "zero": zero or 0,
    }
    if micro_batch := whole_at(keys, MICRO, path):
        knobs["micro_batch"] = micro_batch
    return Configuration(
        knobs=knobs,
        offload=Offload(optimizer=float(ratio) * hosted, weights=float(weights)),
        global_batch=whole_at(keys, BATCH, path),
        precision=_precision(stated),
        num_micro_batches=whole_at(keys, STEPS, path),
        unmodelled=others.unmodelled,
        untouched=others.untouched,
    )


def beside(path: str, key: str, name: object) -> Configuration:
    """What the JSON says that a file at `path` names in `key`. Raises InputError without one."""
    file = file_beside(path, key, name)
    return read_lines(read_deepspeed, text_of(read_bytes(file), file), str(file))


def _precision(keys: Mapping[str, Any]) -> Precision | None:
    """None where the trainer says it."""
    given = {each: keys.get(f"{each}.enabled") for each in (Precision.BF16, Precision.FP16)}
    on = [each for each, value in given.items() if value not in (None, False, "auto")]
    return on[0] if on else None if "auto" in given.values() else Precision.FP32
