"""Megatron-Bridge: a function that sets a plan on the configuration of a recipe; the inverse.

Its configuration has the values of Megatron-LM's options under other names: TransformerConfig,
DistributedDataParallelConfig and OptimizerConfig of megatron-core, TrainingConfig of Bridge 0.6.2.
A file is read as a syntax tree and never run.
"""

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from mist.errors import InputError
from mist.export.bridge_recipes import BridgeRecipe, settings_of_recipe
from mist.export.launcher_lines import head
from mist.export.megatron_arguments import DECISIVE, layout_lines, read_megatron
from mist.export.megatron_arguments import NAMES as OPTIONS
from mist.export.megatron_model import ArgumentLine
from mist.export.recipe_modules import module_of, names_recipe
from mist.export.target import Configuration, ExportSource, Written, added
from mist.export.unread_settings import SettingKinds, unread, with_unread
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
    f"cfg.{FIELDS[option]}": answered for option, answered in OPTIONS.items() if option in FIELDS
}
PRECISION: Final = "cfg.mixed_precision"
PRECISIONS: Final = {Precision.BF16: "bf16_mixed", Precision.FP16: "16_mixed", Precision.FP32: None}
LISTED: Final = ("model.recompute_modules",)
FSDP: Final = FIELDS["--use-megatron-fsdp"]
STRATEGY: Final = FIELDS["--data-parallel-sharding-strategy"]
SETS: Final = frozenset({FIELDS["--tensor-model-parallel-size"], FIELDS["--micro-batch-size"]})


def write_bridge(subject: ExportSource) -> Written:
    """A module with a function that changes a recipe's configuration."""
    precision = PRECISIONS[subject.plan.workload.precision]
    lines = [
        *head(subject, "For Megatron-Bridge: cfg = set_plan(your_recipe()), before pretrain(cfg)."),
        "",
        "",
        "def set_plan(cfg):",
        *(f"    {line}" for line in _lines(subject)),
        f"    {PRECISION} = {precision!r}  # workload.precision",
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
    """Whether a text sets the tensor parallelism of a configuration, or names a known recipe."""
    return "cfg.model.tensor_model_parallel_size =" in text or names_recipe(text)


KINDS: Final = SettingKinds(
    read=frozenset({*(f"cfg.{name}" for name in FIELDS.values())}),
    untouched=(
        "cfg.tokenizer.", "cfg.dataset.", "cfg.logger", "cfg.checkpoint.", "cfg.scheduler.",
        "cfg.validation.", "cfg.rng.", "cfg.env_vars", "cfg.dist.", "cfg.profiling.",
        "cfg.train.train_iters", "cfg.train.manual_gc", "cfg.train.eval", "cfg.optimizer.lr",
        "cfg.optimizer.min_lr", "cfg.optimizer.adam_", "cfg.optimizer.weight_decay",
        "cfg.optimizer.clip_grad", "cfg.ddp.check_for_nan", "cfg.model.should_pad_vocab",
        "cfg.model.pipeline_dtype",
    ),
    # Those of Megatron-LM, for which each option has a field of its name.
    decisive={
        f"cfg.model.{option.removeprefix('--').replace('-', '_')}": (*values, "none", "false")
        for option, values in DECISIVE.items()
    }
    | dict.fromkeys(("cfg.peft", "cfg.peft.target_modules"), ("none",)),
)  # fmt: skip


def read_bridge(text: str, path: str) -> Configuration:
    """The layout that a module sets, or a script that starts a recipe.

    Raises InputError for what is no Python, or no constant, for a module of several recipes, and
    for a script of an unknown one.
    """
    module = module_of(text, path)
    try:
        tree = ast.parse(module.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} is no Python: {error}.") from error
    _refuse_several(tree, path)
    options = {name: option for option, name in FIELDS.items()}
    settings, words = {}, {}
    for name, line, value in _assigned(tree):
        settings[f"cfg.{name}".rstrip(".")] = ast.unparse(value)
        if name in options:  # a later line overrides, also where it switches something off
            words[name] = _words(options[name], value, f"{path}, line {line}: cfg.{name}")
    if _is_idle_strategy(words, module.recipe):
        del words[STRATEGY]
    precision = _precision(settings.get(PRECISION, ""))
    if precision is not None:
        del settings[PRECISION]
    others = unread(settings, KINDS, module.places, path)
    try:
        said = read_megatron("\n".join(words.values()), path)
    except InputError as error:
        raise InputError(_in_fields(str(error))) from error
    model = module.recipe.model if module.recipe and "cfg.model" not in settings else None
    unmodelled = (*said.unmodelled, *module.options)
    said = replace(said, precision=precision, model=model, unmodelled=unmodelled)
    return with_unread(replace(said, launched=module.launched), others)


def _is_idle_strategy(words: Mapping[str, str], recipe: BridgeRecipe | None) -> bool:
    """Whether the strategy is the recipe's own, and FSDP is off: nobody reads it or wrote it."""
    if recipe is None or words.get(FSDP):
        return False
    return words[STRATEGY].endswith(f" {settings_of_recipe(recipe)[STRATEGY]}")


def _refuse_several(tree: ast.Module, path: str) -> None:
    """Raise InputError where more than one function sets a layout: nothing says which is meant."""
    found = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(name in SETS for name, *_ in _assigned(node))
    ]
    if len(found) > 1:
        raise InputError(
            f"{path} has {len(found)} recipes ({', '.join(found):.200}). Give a file with one of "
            "them."
        )


def _in_fields(message: str) -> str:
    """A message about options of Megatron-LM, about the fields that say them."""
    for option, name in FIELDS.items():
        message = re.sub(rf"{option}(?![\w-])", f"cfg.{name}", message)
    return message


def _assigned(tree: ast.AST) -> Iterator[tuple[str, int, ast.expr]]:
    """What is assigned to a field of cfg, its line and the value, in the order of the file.

    The configuration itself ("") where it is that of another recipe.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            name = ast.unparse(node.targets[0])
            if name.startswith("cfg.") or name == "cfg":
                yield name.removeprefix("cfg").removeprefix("."), node.lineno, node.value


def _precision(text: str) -> Precision | None:
    """Of a name such as "bf16_mixed", or of a call that has it; None for others, as of fp8."""
    named = re.findall(r"\w+", text)
    known = [one for one, word in PRECISIONS.items() if {str(one), str(word)} & set(named)]
    return known[0] if len(known) == 1 else None


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
