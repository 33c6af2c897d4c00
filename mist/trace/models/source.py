"""What to trace, without torch: a Python file, a configuration or a preset; and for what."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from mist.documents import read_json, read_text
from mist.errors import InputError, ModelError, did_you_mean
from mist.files import is_file, is_folder, user_path
from mist.plans.memory_levels import KEEPS_ALL
from mist.plans.workload import Attention, HeadMode, MemoryLevel, Precision
from mist.trace.models.presets import PRESETS

# Keys by which a configuration names code that transformers would fetch, and what it has itself.
FETCHING: Final = re.compile(
    r"_?(attn|experts)_implementation(_internal)?|use_kernels|kernel_config|kernels"
)
OWN_KERNELS: Final = (None, False, "eager", "sdpa", "batched_mm", "grouped_mm")
# Kernels that transformers takes from a hub where their package is not installed. Many published
# configurations name one: it is left out, and never asked for.
LEFT_OUT: Final = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

Policy = Literal["cuda", "cpu"]
# Words in the names of numbers of parts, which transformers makes one by one; a key that ends as
# SIZE is the size of something. A thousand layers is the most that anybody trained.
MOST_PARTS: Final = {"layer|block|stage|depth|repeat": 4096, "expert|head": 2**16, "label": 2**20}
SIZE: Final = re.compile(
    r"(size|sizes|dim|dims|len|length|tokens|positions|embeddings|factor|theta|base|id|eps|scale)"
    r"(_per_\w+)?$"
)
MAX_SEQ_LEN_NAMES: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "block_size",
    "max_target_positions",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSetting:
    """For which kernels and precision a model is traced.

    Policy "cuda": what a GPU would run; "cpu": what this machine runs. `autocast`: parameters stay
    fp32 and operations run in `precision` as torch.autocast decides. `fused_norms`: RMS norms
    written in several operations run as one kernel. `compiled`: each layer runs under
    torch.compile. `capacity_ratio`: rows of an expert whose rows
    are selected by value, over those of a balanced one. `seq_len`: a length [tokens] that the trace
    must hold for; None for the usual one of the model. `images`: of a sample, where the model looks
    at images that texts hold; None: one, or none where it cannot be traced with it. `level`: the
    memory level that layers are converted to first, where it converts them; `head`: how the last
    matrix and the loss run. Raises InputError for settings that contradict each other.
    """

    precision: Precision
    attention: Attention
    policy: Policy = "cuda"
    autocast: bool = False
    fused_norms: bool = False
    compiled: bool = False
    capacity_ratio: float = 1.0
    seq_len: int | None = None
    images: int | None = None
    level: MemoryLevel = KEEPS_ALL
    head: HeadMode = HeadMode.NONE

    def __post_init__(self) -> None:
        if self.autocast and self.precision is Precision.FP32:
            raise InputError(
                "--autocast needs --precision bf16 or fp16: fp32 is what it casts from."
            )
        if not 0 < self.capacity_ratio < float("inf"):
            raise InputError(f"--capacity {self.capacity_ratio} is not a positive number.")

    @property
    def words(self) -> tuple[str, ...]:
        """The setting as text, for digests, without the length: one trace holds for many."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        del values["seq_len"]
        if self.images is None:  # as before there was a choice
            del values["images"]
        return tuple(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonSource:
    """A file that defines build_model(). `name` is the default name of its model."""

    label: str
    name: str
    path: Path
    text: str

    @property
    def content(self) -> str:
        """What the trace depends on, apart from imported local modules."""
        return f"{self.path.resolve()}\n{self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSource:
    """The fields of a Hugging Face configuration, with `model_type`.

    `adapter_rank`: of the adapters that are trained in the place of the model (LoRA); 0: none.
    """

    label: str
    name: str
    config: Mapping[str, Any]
    adapter_rank: int = 0

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence of a language model, if the configuration says it."""
        if "image_size" in self.config:  # sequences of patches are another number
            return None
        lengths = (self.config.get(name) for name in MAX_SEQ_LEN_NAMES)
        return next((length for length in lengths if isinstance(length, int)), None)

    @property
    def content(self) -> str:
        """What the trace depends on."""
        adapters = f"\nadapters of rank {self.adapter_rank}" if self.adapter_rank else ""
        return f"{self.name}\n{json.dumps(dict(self.config), sort_keys=True)}{adapters}"


Source = PythonSource | ConfigSource


def resolve(source: str) -> Source:
    """The Python file, config.json (or its folder), or preset that `source` names.

    Raises ModelError when there is no such thing, or when it is no model description.
    """
    path = user_path(source)
    if source in PRESETS and not (is_file(path) or is_folder(path)):
        return ConfigSource(label=f"preset {source}", name=source, config=PRESETS[source])
    if is_folder(path):
        return _folder(path)
    if not is_file(path):
        raise ModelError(
            f"model {source!r} is neither a file, a folder with a config.json, nor a preset. "
            f"{did_you_mean(source, PRESETS)}"
        )
    if path.suffix == ".json":
        return _config(path)
    if path.suffix == ".py":
        name = path.stem.replace("_", "-")
        return PythonSource(label=str(path), name=name, path=path, text=read_text(path, ModelError))
    raise ModelError(
        f"model {source!r} is a {path.suffix or 'nameless'} file. "
        "Give a Python file with build_model(), a Hugging Face config.json, or a preset: "
        f"{', '.join(sorted(PRESETS))}."
    )


def _folder(folder: Path) -> ConfigSource:
    path = folder / "config.json"
    if not is_file(path):
        raise ModelError(
            f"folder {str(folder)!r} holds no config.json. "
            "Give the folder of a Hugging Face model, or a Python file with build_model()."
        )
    return _config(path)


def _config(path: Path) -> ConfigSource:
    # Configurations of some models have an infinite limit, which Python writes as Infinity.
    config = read_json(path, ModelError, is_finite=False)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path} has no model_type, so it is not a Hugging Face model configuration. "
            'Add for example "model_type": "llama".'
        )
    _refuse_fetching(path, config)
    _refuse_counts(path, config)
    absolute = path.resolve()
    stem = absolute.parent.name if absolute.name == "config.json" else absolute.stem
    name = Path(str(config.get("_name_or_path") or stem)).name.lower()
    return ConfigSource(label=str(path), name=name, config=config)


def _refuse_counts(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a number of parts, at any depth, that would be built one by one."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_counts(path, value)
        elif isinstance(value, int | float) and not SIZE.search(key):
            for word, most in MOST_PARTS.items():
                if re.search(word, key) and value > most:
                    raise ModelError(f"{path} has {key} {value}: Mist builds at most {most}.")


def without_kernels(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration, or a part of one, that names none of the kernels that are left out."""
    return {
        key: _without_kernels(value)
        for key, value in config.items()
        if not (FETCHING.fullmatch(key) and any(each in LEFT_OUT for each in _leaves(value)))
    }


def _without_kernels(value: object) -> object:
    if isinstance(value, list):
        return [_without_kernels(each) for each in value]
    return without_kernels(value) if isinstance(value, dict) else value


def _refuse_fetching(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for kernels that would come from elsewhere, at any depth: they are code."""
    found, known = [*config.items()], (*OWN_KERNELS, *LEFT_OUT)
    while found:
        key, value = found.pop()
        if FETCHING.fullmatch(key) and not all(each in known for each in _leaves(value)):
            raise ModelError(
                f"{path} has {key} {json.dumps(value)}, which transformers may fetch and run. "
                "Remove it: --attention says which attention is planned."
            )
        # A list has the key of its own for each of its values.
        inner = value if isinstance(value, list) else []
        found += value.items() if isinstance(value, dict) else ((key, each) for each in inner)


def _leaves(value: object) -> list[object]:
    """The words that a value says, for one part of the model or for each of them."""
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else [value]
