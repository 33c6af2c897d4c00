"""Megatron-Bridge: a function that sets a plan on the configuration of a recipe; the inverse.

Its configuration has the values of Megatron-LM's options under other names: TransformerConfig,
DistributedDataParallelConfig and OptimizerConfig of megatron-core, TrainingConfig of Bridge 0.6.2.
A file is read as a syntax tree and never run.
"""

import ast
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from mist.errors import InputError
from mist.export.launcher_lines import head
from mist.export.megatron_arguments import NAMES as OPTIONS
from mist.export.megatron_arguments import ArgumentLine, layout_lines, read_megatron
from mist.export.target import Configuration, ExportSource, Written, added
from mist.plans.workload import Precision

CONFIG: Final = "bridge_plan.py"
FIELDS: Final = {
    "--tensor-model-parallel-size": "model.tensor_model_parallel_size",
    "--sequence-parallel": "model.sequence_parallel",
    "--pipeline-model-parallel-size": "model.pipeline_model_parallel_size",
    "--pipeline-model-parallel-layout": "model.pipeline_model_parallel_layout",
    "--num-virtual-stages-per-pipeline-rank": "model.virtual_pipeline_model_parallel_size",
    "--seq-length": "model.seq_length",
    "--recompute-granularity": "model.recompute_granularity",
    "--recompute-method": "model.recompute_method",
    "--recompute-num-layers": "model.recompute_num_layers",
    "--recompute-modules": "model.recompute_modules",
    "--micro-batch-size": "train.micro_batch_size",
    "--global-batch-size": "train.global_batch_size",
    "--use-distributed-optimizer": "ddp.use_distributed_optimizer",
    "--overlap-grad-reduce": "ddp.overlap_grad_reduce",
    "--overlap-param-gather": "ddp.overlap_param_gather",
    "--use-megatron-fsdp": "ddp.use_megatron_fsdp",
    "--data-parallel-sharding-strategy": "ddp.data_parallel_sharding_strategy",
    "--ckpt-format": "checkpoint.ckpt_format",
    "--optimizer-cpu-offload": "optimizer.optimizer_cpu_offload",
    "--optimizer-offload-fraction": "optimizer.optimizer_offload_fraction",
    "--use-precision-aware-optimizer": "optimizer.use_precision_aware_optimizer",
}
"""Options of Megatron-LM and what they are called in the configuration of Bridge."""
NAMES: Final = {
    answered: tuple(f"cfg.{FIELDS[option]}" for option in options if option in FIELDS)
    for answered, options in OPTIONS.items()
}
PRECISIONS: Final = {Precision.BF16: "bf16_mixed", Precision.FP16: "16_mixed"}
LISTED: Final = ("model.recompute_modules",)


def write_bridge(subject: ExportSource) -> Written:
    """A module with a function that changes a recipe's configuration."""
    precision = PRECISIONS.get(subject.plan.workload.precision)
    lines = [
        *head(subject, "For Megatron-Bridge: cfg = set_plan(your_recipe()), before pretrain(cfg)."),
        "",
        "",
        "def set_plan(cfg):",
        *(f"    {line}" for line in _lines(subject)),
        *([f'    cfg.mixed_precision = "{precision}"  # workload.precision'] if precision else []),
        "    return cfg",
    ]
    words = "the model, its optimizer and data are those of your recipe"
    return Written(files={CONFIG: "\n".join(lines) + "\n"}, added=[added("model", words)])


def _lines(subject: ExportSource) -> Iterator[str]:
    plan = subject.plan
    for line in layout_lines(plan):
        if line.option in FIELDS:
            yield f"cfg.{FIELDS[line.option]} = {_value(line)!r}  # {line.field}"
    yield f"cfg.dataset.seq_length = {plan.workload.seq_len}  # workload.seq_len"


def _value(line: ArgumentLine) -> Any:  # noqa: ANN401 - of any option
    """The value of an option as Python has it; a flag is True."""
    if FIELDS[line.option] in LISTED:
        return line.value.split()
    if not line.value:
        return True
    try:
        return ast.literal_eval(line.value)
    except (ValueError, SyntaxError):
        return str(line.value)  # a word of a table is written as its text


def recognises_bridge(text: str) -> bool:
    """Whether a text sets the tensor parallelism of a configuration."""
    return "cfg.model.tensor_model_parallel_size =" in text


def read_bridge(text: str, path: str) -> Configuration:
    """The layout that a module sets. Raises InputError for what is no Python, or no constant."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} is no Python: {error}.") from error
    options = {name: option for option, name in FIELDS.items()}
    words, unmodelled = [], []
    for name, line, value in _assigned(tree):
        if name in options:
            words.append(_words(options[name], value, f"{path}, line {line}: cfg.{name}"))
        elif name == "mixed_precision":
            words += [f"--{one}" for one, known in PRECISIONS.items() if _constant(value) == known]
        elif name != "dataset.seq_length":
            unmodelled.append(f"line {line}: cfg.{name} = {ast.unparse(value)}")
    said = read_megatron("\n".join(words), path)
    return replace(said, unmodelled=(*said.unmodelled, *unmodelled))


def _assigned(tree: ast.AST) -> Iterator[tuple[str, int, ast.expr]]:
    """What is assigned to a field of cfg, its line and the value, in the order of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            name = ast.unparse(node.targets[0])
            if name.startswith("cfg."):
                yield name.removeprefix("cfg."), node.lineno, node.value


def _constant(value: ast.expr) -> Any:  # noqa: ANN401 - of any type
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return None


def _words(option: str, value: ast.expr, place: str) -> str:
    """The option as Megatron-LM has it; nothing for False and None."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError) as error:
        raise InputError(f"{place} = {ast.unparse(value)}: it is no constant.") from error
    if found is True:
        return option
    if found is False or found is None:
        return ""
    parts = found if isinstance(found, list | tuple) else [found]
    return f"{option} {' '.join(shlex.quote(str(part)) for part in parts)}"
