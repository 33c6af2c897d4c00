"""Settings of torchtitan as people have them, read back: a module, options, a TOML file.

Fields: torchtitan/config/configs.py of 0.3.0; a TOML file of earlier versions has the same
sections, some under other names. A module is read as a syntax tree and never run: calls of
ParallelismConfig and TrainingConfig, assignments to `config.parallelism.x`. Options are those of
a command line: --parallelism.tensor_parallel_degree 2.
"""

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from mist.errors import InputError
from mist.export.command_words import options_of
from mist.export.setting_values import leaves
from mist.export.target import Configuration
from mist.export.torchtitan_module import DTYPES, SCHEDULE_NAMES
from mist.export.unread_settings import NEVER, SettingKinds, unread
from mist.plans.memory_levels import KEEPS_ALL, OWN_PART, REPEATS_ALL
from mist.plans.plan import Offload
from mist.plans.schedules import DEFAULT_KIND
from mist.plans.workload import Precision, ScheduleKind

TOML_SECTIONS: Final = re.compile(r"(?m)^\s*\[(job|parallelism|training|activation_checkpoint)\]")


def recognises_torchtitan(text: str) -> bool:
    """Whether a text is a module for torchtitan, has options of it, or two sections of its TOML."""
    sections = set(TOML_SECTIONS.findall(text))
    return "torchtitan" in text or "--parallelism." in text or len(sections) > 1


CHECKPOINT: Final = "activation_checkpoint"
# Sections that a module makes by a call, under names of now and of before.
CALLS: Final = {
    "ParallelismConfig": "parallelism.", "Parallelism": "parallelism.",
    "TrainingConfig": "training.", "Training": "training.",
    "CompileConfig": "compile.", "Compile": "compile.",
    "ActivationCheckpoint": f"{CHECKPOINT}.", "Optimizer": "optimizer.",
}  # fmt: skip
# Those that decide how a model is trained; loggers, checkpoints and data do not.
SECTIONS: Final = ("parallelism", "training", "compile", "optimizer", "model_spec", "comm")
PARTS: Final = "parallelism.module_fqns_per_model_part"
Settings = Mapping[str, Any]
NAMES: Final = {
    "parallelism.tensor_parallel_degree": "tp",
    "training.tensor_parallel_size": "tp",
    "parallelism.pipeline_parallel_degree": "pp",
    PARTS: "layers",
    "parallelism.pipeline_parallel_schedule": "schedule",
    "parallelism.fsdp_reshard_after_forward": "zero",
    "parallelism.data_parallel_shard_degree": "dp",
    "parallelism.data_parallel_replicate_degree": "dp_replicate",
    "training.local_batch_size": "micro_batch",
    "training.batch_size": "micro_batch",
    "parallelism.pipeline_parallel_microbatch_size": "micro_batch",
    "training.global_batch_size": "global_batch",
    "training.seq_len": "seq",
    CHECKPOINT: "checkpoint",
    "training.enable_cpu_offload": "offload",
}
"""Which option of `mist check` a setting answers, under names of now and of before."""

# Words of a file, and what a module has for them.
MODES: Final = {KEEPS_ALL.value: "None", REPEATS_ALL.value: "FullAC"}
OLD_NAMES: Final = {
    "training.batch_size": "training.local_batch_size",
    "training.tensor_parallel_size": "parallelism.tensor_parallel_degree",
    "training.compile": "compile.enable",
    "parallelism.data_parallel_degree": "parallelism.data_parallel_shard_degree",
}
KINDS: Final = SettingKinds(
    read=frozenset(
        f"parallelism.{name}"
        for name in (
            "data_parallel_replicate_degree", "data_parallel_shard_degree",
            "fsdp_reshard_after_forward", "tensor_parallel_degree", "enable_sequence_parallel",
            "pipeline_parallel_degree", "pipeline_parallel_schedule",
            "pipeline_parallel_microbatch_size", "module_fqns_per_model_part",
        )
    )
    | frozenset(
        f"training.{name}"
        for name in (
            "local_batch_size", "global_batch_size", "seq_len", "mixed_precision_param",
            "enable_cpu_offload", "disable_cuda_graphs",
        )
    )
    | {CHECKPOINT, f"{CHECKPOINT}.layers", "compile.enable"},
    untouched=(
        "job.", "profiling.", "metrics.", "lr_scheduler.", "checkpoint.", "validation.", "model.",
        "debug.", "fault_tolerance.", "memory_estimation.", "optimizer.lr", "optimizer.eps",
        "optimizer.beta", "optimizer.weight_decay", "training.dataset", "training.steps",
        "training.max_norm", "training.seed", "training.warmup", "training.gc_", "training.data_",
        "training.deterministic", "compile.components", "compile.backend", "comm.",
    ),
    decisive={
        "parallelism.context_parallel_degree": ("1",),
        "parallelism.expert_parallel_degree": ("1",),
        "parallelism.expert_tensor_parallel_degree": ("1",),
        "parallelism.pipeline_parallel_split_points": ("[]",),
        "optimizer.name": ("adamw", "adam"),
        "optimizer.state_dtype": ("float32",),
        "training.dtype": ("float32",),
        "optimizer.early_step_in_backward": ("false",),
        f"{CHECKPOINT}.selective_ac_option": ("op",),
        f"{CHECKPOINT}.memory_budget": NEVER,
    },
)  # fmt: skip


def read_torchtitan(text: str, path: str) -> Configuration:
    """The layout of a module or of command-line options. Raises InputError naming a setting."""
    settings = _named_as_now(dict(_of_file(text, path)))
    others = unread(settings, KINDS, text, path)
    whole = _WholeSettings(settings, path)
    degrees = {
        name: whole.number(f"parallelism.{axis}_parallel_degree", 1, least=1)
        for name, axis in (("tp", "tensor"), ("pp", "pipeline"))
    }
    pp = degrees["pp"]
    parts = _chunks(settings, path, pp)
    batch = whole.number("training.local_batch_size", 8, least=1)
    micro_batch = whole.number("parallelism.pipeline_parallel_microbatch_size", 1, least=1)
    copies = whole.number("parallelism.data_parallel_replicate_degree", 1, least=1)
    shard = whole.number("parallelism.data_parallel_shard_degree", -1)
    offload = float(settings.get("training.enable_cpu_offload") is True)
    zero = _zero(settings, shard, pp)
    global_batch = whole.number("training.global_batch_size", -1)
    return Configuration(
        knobs={
            **degrees,
            "vpp": max(len(parts) // pp, 1),
            "zero": zero,
            "dp_replicate": copies if zero else 1,
            "micro_batch": micro_batch if pp > 1 else batch,
        },
        checkpoint=_checkpoint(settings, path, parts, pp),
        schedule=_schedule(settings, path),
        offload=Offload(weights=offload, grads=offload, optimizer=offload),
        layers=tuple(len(part) for part in parts),
        seq_len=whole.number("training.seq_len", 2048),
        global_batch=None if global_batch < 1 else global_batch,
        precision=_precision(settings),
        # Nothing is accumulated where no global batch is stated.
        num_micro_batches=batch // micro_batch if pp > 1 else 1 if global_batch < 1 else None,
        dp=copies * shard if shard > 0 else None,
        num_layers=sum(len(part) for part in parts) or None,
        shards_sequence=settings.get("parallelism.enable_sequence_parallel") is not False,
        unmodelled=(*_compiled(settings), *others.unmodelled),
        untouched=others.untouched,
    )


def _of_file(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names. Raises InputError for what is neither of the three."""
    if path.endswith(".py"):
        return _settings(text, path)
    return _of_toml(text, path) if TOML_SECTIONS.search(text) else _typed(text, path)


def _of_toml(text: str, path: str) -> Iterator[tuple[str, Any]]:
    try:
        return leaves(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not TOML: {error}.") from error


def _named_as_now(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings under the names of today; recomputation as a module says it."""
    found = {_renamed(_renamed(name)): value for name, value in settings.items()}
    mode = found.pop(f"{CHECKPOINT}.mode", None)
    if mode is None and any(name.startswith(f"{CHECKPOINT}.selective") for name in found):
        mode = OWN_PART.value  # the default of the section
    if mode is not None:
        found[CHECKPOINT] = MODES.get(str(mode), str(mode))
    if found.get(CHECKPOINT) != OWN_PART:
        found = {n: v for n, v in found.items() if not n.startswith(f"{CHECKPOINT}.selective")}
    return found


def _renamed(name: str) -> str:
    section, _, last = name.partition(".")
    is_degree = section == "training" and last.endswith("_degree")
    if is_degree or section == "experimental":
        return f"parallelism.{last}"
    return OLD_NAMES.get(name, name)


class _WholeSettings:
    """Settings that are whole numbers."""

    def __init__(self, settings: Settings, path: str) -> None:
        self._settings, self._path = settings, path

    def number(self, name: str, default: int, least: int = -1) -> int:
        """The number of a setting; -1 leaves it to torchtitan. Raises InputError."""
        value = self._settings.get(name, default)
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,15}", text):
            raise InputError(f"{self._path}: {name} {text:.40} is no whole number.")
        if int(text) < least:
            raise InputError(f"{self._path}: {name} {text} is less than {least}.")
        return int(text)


def _settings(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Settings of a module by their dotted names; a value that is no literal is its text."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} is not Python: {error}.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield from _of_assignment(ast.unparse(node.targets[0]), node.value)


def _of_call(node: ast.Call) -> Iterator[tuple[str, Any]]:
    name = ast.unparse(node.func)
    for word in node.keywords:
        if prefix := CALLS.get(name.rpartition(".")[2]):
            yield f"{prefix}{word.arg}", _literal(word.value)
        elif name.endswith("AC.Config") and word.arg:
            yield f"{CHECKPOINT}.{word.arg}", _literal(word.value)
        elif word.arg == CHECKPOINT:
            yield CHECKPOINT, ast.unparse(word.value)


def _of_assignment(target: str, value: ast.expr) -> Iterator[tuple[str, Any]]:
    """A field that is set on a configuration; whole sections are calls, which are read by part."""
    name = target.partition(".")[2]
    if name == CHECKPOINT:
        yield name, ast.unparse(value)
    elif name.partition(".")[0] in SECTIONS and "." in name:
        yield name, _literal(value)


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _typed(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Settings of a command line."""
    for option, values in options_of(text, path).items():
        name = option.removeprefix("--").replace("-", "_")
        if "." in name:
            value = " ".join(values)
            yield name, {"": True, "True": True, "False": False}.get(value, value)
    for word in re.findall(r"activation-checkpoint:(\w+)", text):
        yield CHECKPOINT, word


def _zero(settings: Settings, shard: int, pp: int) -> int:
    """ZeRO-3 where parameters are given back after the forward pass, ZeRO-2 where they are kept."""
    if shard == 1:
        return 0
    policy = settings.get("parallelism.fsdp_reshard_after_forward", "default")
    kept = policy == "never" or (policy == "default" and pp > 1)
    return 2 if kept else 3


def _chunks(settings: Settings, path: str, pp: int) -> list[list[int]]:
    """Layers of each part of the pipeline."""
    value = settings.get(PARTS)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, list) for part in value):
        # A list on the command line is taken apart at its commas, without an error.
        raise InputError(f"{path}: {PARTS} is no list of lists of names. Write it in Python.")
    if len(value) % max(pp, 1):
        raise InputError(f"{path}: {PARTS} has {len(value)} parts, no multiple of {pp} stages.")
    found = [[re.fullmatch(r"layers\.(\d+)", str(name)) for name in part] for part in value]
    return [[int(name[1]) for name in part if name] for part in found]


def _checkpoint(settings: Settings, path: str, parts: Sequence[Sequence[int]], pp: int) -> str:
    words = str(settings.get(CHECKPOINT, "None"))
    if words == "None":
        return KEEPS_ALL.value
    if "LayerList" in words:
        layers = settings.get(f"{CHECKPOINT}.layers")
        if not isinstance(layers, tuple | list):
            raise InputError(f"{path}: {CHECKPOINT}.layers is no list of layers.")
        if not parts:
            return str(len(layers))
        own = [[layer for part in parts[stage::pp] for layer in part] for stage in range(pp)]
        return ",".join(str(len(set(stage) & set(layers))) for stage in own)
    return REPEATS_ALL.value if re.search("(?i)full", words) else OWN_PART.value


def _schedule(settings: Settings, path: str) -> ScheduleKind:
    name = str(settings.get("parallelism.pipeline_parallel_schedule", SCHEDULE_NAMES[DEFAULT_KIND]))
    for kind, known in SCHEDULE_NAMES.items():
        if known.lower() == name.lower():
            return kind
    known = ", ".join(SCHEDULE_NAMES.values())
    raise InputError(
        f"{path}: parallelism.pipeline_parallel_schedule {name} is not predicted. Known: {known}."
    )


def _precision(settings: Settings) -> Precision:
    name = settings.get("training.mixed_precision_param", DTYPES[Precision.BF16])
    return next((each for each, dtype in DTYPES.items() if dtype == name), Precision.BF16)


def _compiled(settings: Settings) -> Iterator[str]:
    if (value := settings.get("compile.enable", False)) is not False:
        yield f"compile.enable = {value}"
