"""The targets, one row each, which `mist export`, `mist check` and the documents loop over."""

from typing import Final

from mist.errors import InputError, did_you_mean
from mist.export import (
    accelerate_yaml,
    axolotl_yaml,
    cluster_jobs,
    deepspeed_json,
    launcher_lines,
    llamafactory_yaml,
    megatron_arguments,
    megatron_bridge,
    torchtitan_module,
    torchtitan_settings,
    trainer_options,
)
from mist.export.target import Target

TARGETS: Final = (
    Target(
        name="megatron",
        what="Megatron-LM: a file of arguments, a script",
        runtimes=("megatron",),
        expresses=megatron_arguments.MEGATRON,
        write=megatron_arguments.write_megatron,
        recognises=megatron_arguments.recognises_megatron,
        read=megatron_arguments.read_megatron,
        names=megatron_arguments.NAMES,
    ),
    Target(
        name="torchtitan",
        what="torchtitan 0.3: a Python package, a script",
        # It runs FSDP2, tensor and pipeline parallelism of torch: what its own figures do not
        # cover is predicted by those.
        runtimes=("torchtitan", "torch"),
        expresses=torchtitan_module.TORCHTITAN,
        write=torchtitan_module.write_torchtitan,
        recognises=torchtitan_settings.recognises_torchtitan,
        read=torchtitan_settings.read_torchtitan,
        names=torchtitan_settings.NAMES,
    ),
    Target(
        name="deepspeed",
        what="DeepSpeed: a JSON file, a script",
        runtimes=("deepspeed-zero3",),
        expresses=deepspeed_json.DEEPSPEED,
        write=deepspeed_json.write_deepspeed,
        recognises=deepspeed_json.recognises_deepspeed,
        read=deepspeed_json.read_deepspeed,
        names=deepspeed_json.NAMES,
    ),
    # Before accelerate, whose keys it has among its own.
    Target(
        name="axolotl",
        what="axolotl with FSDP2: a YAML file, a script",
        runtimes=("torch",),
        expresses=axolotl_yaml.AXOLOTL,
        write=axolotl_yaml.write_axolotl,
        recognises=axolotl_yaml.recognises_axolotl,
        read=axolotl_yaml.read_axolotl,
        names=axolotl_yaml.NAMES,
    ),
    Target(
        name="accelerate",
        what="accelerate with FSDP2: a YAML file, Trainer arguments, a script",
        runtimes=("torch",),
        expresses=accelerate_yaml.ACCELERATE,
        write=accelerate_yaml.write_accelerate,
        recognises=trainer_options.recognises_trainer,
        read=trainer_options.read_trainer,
        names=trainer_options.NAMES,
    ),
    Target(
        name="megatron-bridge",
        what="Megatron-Bridge: a function that sets the plan on a recipe's configuration",
        runtimes=("megatron",),
        expresses=megatron_arguments.MEGATRON,
        write=megatron_bridge.write_bridge,
        recognises=megatron_bridge.recognises_bridge,
        read=megatron_bridge.read_bridge,
        names=megatron_bridge.NAMES,
    ),
    Target(
        name="llamafactory",
        what="LLaMA-Factory with DeepSpeed: a YAML file, a JSON file, a script",
        runtimes=("deepspeed-zero3",),
        expresses=llamafactory_yaml.LLAMAFACTORY,
        write=llamafactory_yaml.write_llamafactory,
        recognises=llamafactory_yaml.recognises_llamafactory,
        read=llamafactory_yaml.read_llamafactory,
        names=llamafactory_yaml.NAMES,
    ),
    Target(
        name="torchrun",
        what="mist apply under torchrun: a script for each node",
        runtimes=(),
        expresses=None,
        write=launcher_lines.write_torchrun,
    ),
    Target(
        name="slurm",
        what="mist apply under Slurm: a batch script",
        runtimes=(),
        expresses=None,
        write=launcher_lines.write_slurm,
    ),
    Target(
        name="kubernetes",
        what="mist apply as a TrainJob of Kubeflow Trainer: a YAML file",
        runtimes=(),
        expresses=None,
        write=cluster_jobs.write_kubernetes,
    ),
    Target(
        name="skypilot",
        what="mist apply as a task of SkyPilot: a YAML file",
        runtimes=(),
        expresses=None,
        write=cluster_jobs.write_skypilot,
    ),
)


def target_named(name: str) -> Target:
    """The row of a name. Raises InputError with the nearest names."""
    for target in TARGETS:
        if target.name == name:
            return target
    raise InputError(f"--to {name}: {did_you_mean(name, (target.name for target in TARGETS))}")


def target_of(text: str) -> Target | None:
    """The target whose file a text is; None where it is none."""
    for target in TARGETS:
        if target.recognises is not None and target.recognises(text):
            return target
    return None
