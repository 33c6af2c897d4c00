"""The targets, one row each, which `mist export`, `mist check` and the documents loop over."""

from typing import Final

from mist.errors import InputError, did_you_mean
from mist.export.accelerate_yaml import ACCELERATE, write_accelerate
from mist.export.axolotl_yaml import (
    AXOLOTL,
    read_axolotl,
    recognises_axolotl,
    write_axolotl,
)
from mist.export.cluster_jobs import write_kubernetes, write_skypilot
from mist.export.deepspeed_json import (
    DEEPSPEED,
    read_deepspeed,
    recognises_deepspeed,
    write_deepspeed,
)
from mist.export.launcher_lines import write_slurm, write_torchrun
from mist.export.llamafactory_yaml import (
    LLAMAFACTORY,
    read_llamafactory,
    recognises_llamafactory,
    write_llamafactory,
)
from mist.export.megatron_arguments import (
    MEGATRON,
    read_megatron,
    recognises_megatron,
    write_megatron,
)
from mist.export.megatron_bridge import read_bridge, recognises_bridge, write_bridge
from mist.export.target import Target
from mist.export.torchtitan_module import TORCHTITAN, write_torchtitan
from mist.export.torchtitan_settings import read_torchtitan, recognises_torchtitan
from mist.export.trainer_options import read_trainer, recognises_trainer

TARGETS: Final = (
    Target(
        name="megatron",
        what="Megatron-LM: a file of arguments, a script",
        runtimes=("megatron",),
        expresses=MEGATRON,
        write=write_megatron,
        recognises=recognises_megatron,
        read=read_megatron,
    ),
    Target(
        name="torchtitan",
        what="torchtitan 0.3: a Python package, a script",
        # It runs FSDP2, tensor and pipeline parallelism of torch: what its own figures do not
        # cover is predicted by those.
        runtimes=("torchtitan", "torch"),
        expresses=TORCHTITAN,
        write=write_torchtitan,
        recognises=recognises_torchtitan,
        read=read_torchtitan,
    ),
    Target(
        name="deepspeed",
        what="DeepSpeed: a JSON file, a script",
        runtimes=("deepspeed-zero3",),
        expresses=DEEPSPEED,
        write=write_deepspeed,
        recognises=recognises_deepspeed,
        read=read_deepspeed,
    ),
    # Before accelerate, whose keys it has among its own.
    Target(
        name="axolotl",
        what="axolotl with FSDP2: a YAML file, a script",
        runtimes=("torch",),
        expresses=AXOLOTL,
        write=write_axolotl,
        recognises=recognises_axolotl,
        read=read_axolotl,
    ),
    Target(
        name="accelerate",
        what="accelerate with FSDP2: a YAML file, Trainer arguments, a script",
        runtimes=("torch",),
        expresses=ACCELERATE,
        write=write_accelerate,
        recognises=recognises_trainer,
        read=read_trainer,
    ),
    Target(
        name="megatron-bridge",
        what="Megatron-Bridge: a function that sets the plan on a recipe's configuration",
        runtimes=("megatron",),
        expresses=MEGATRON,
        write=write_bridge,
        recognises=recognises_bridge,
        read=read_bridge,
    ),
    Target(
        name="llamafactory",
        what="LLaMA-Factory with DeepSpeed: a YAML file, a JSON file, a script",
        runtimes=("deepspeed-zero3",),
        expresses=LLAMAFACTORY,
        write=write_llamafactory,
        recognises=recognises_llamafactory,
        read=read_llamafactory,
    ),
    Target(
        name="torchrun",
        what="mist apply under torchrun: a script for each node",
        runtimes=(),
        expresses=None,
        write=write_torchrun,
    ),
    Target(
        name="slurm",
        what="mist apply under Slurm: a batch script",
        runtimes=(),
        expresses=None,
        write=write_slurm,
    ),
    Target(
        name="kubernetes",
        what="mist apply as a TrainJob of Kubeflow Trainer: a YAML file",
        runtimes=(),
        expresses=None,
        write=write_kubernetes,
    ),
    Target(
        name="skypilot",
        what="mist apply as a task of SkyPilot: a YAML file",
        runtimes=(),
        expresses=None,
        write=write_skypilot,
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
