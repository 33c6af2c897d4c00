"""From a resolved source to a model on the meta device, and how to run it on a batch."""

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mist.errors import ModelError, TraceError, did_you_mean
from mist.plans.workload import Attention, Precision
from mist.trace.diagnose import one_line
from mist.trace.expressions import Size
from mist.trace.models.fake_tensors import DTYPES
from mist.trace.models.source import MAX_SEQ_LEN_NAMES, PythonSource, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MakeBatch = Callable[[Size, Size], object]
Number = int | float | torch.SymInt | torch.Tensor
Loss = Callable[..., object]  # a mean, or the pair (sum over tokens, number of tokens)

MOST_MODULES: Final = 2**18  # a model with a module for each of its 15,000 experts has a third
OURS: Final = Path(__file__).resolve().parents[2]
TOKENS, IMAGES = "input_ids", "pixel_values"
LABELS: Final = "labels"
# What a configuration without `architectures` is for: the first of these heads that it can have.
HEADS: Final = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A module with its name, its input and its loss; `make_batch` and `loss` are the user's."""

    module: nn.Module
    name: str
    make_batch: MakeBatch | None
    loss: Loss | None

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model takes, if it says so; of an image, its patches."""
        config: Any = getattr(self.module, "config", None)
        if self._input() == IMAGES and (patch := getattr(config, "patch_size", None)):
            sides = zip(_sides(config.image_size), _sides(patch), strict=True)
            return prod(image // part for image, part in sides)
        for owner in (self.module, config):
            for name in MAX_SEQ_LEN_NAMES:
                value = getattr(owner, name, None)
                if isinstance(value, int):
                    return value
        return None

    def batch(self, batch: Size, seq: Size) -> object:
        """One micro-batch: the user's, or token ids [batch, seq]; labels for Hugging Face.

        An encoder-decoder gets `seq` tokens at both ends; a model of images one image each.
        """
        if self.make_batch is not None:
            return self.make_batch(batch, seq)
        if self._input() == IMAGES:
            config: Any = self.module.config
            shape = (config.num_channels, *_sides(config.image_size))
            labels = torch.empty(batch, dtype=torch.int64)
            return {"pixel_values": torch.empty(batch, *shape), "labels": labels}
        # Values do not matter: ids and labels may be one tensor.
        ids = torch.empty(batch, seq, dtype=torch.int64)
        if not (hasattr(self.module, "loss_function") and "labels" in self._parameters()):
            return ids
        second = {"decoder_input_ids": ids} if "decoder_input_ids" in self._parameters() else {}
        return {"input_ids": ids, "labels": ids, **second}

    def run(self, batch: object) -> torch.Tensor:
        """Forward and mean loss, as one process has them."""
        loss, number = self.loss_of(self.forward(batch), batch)
        return loss if number is None else loss / number

    def loss_of(self, output: object, batch: object) -> tuple[torch.Tensor, Number | None]:
        """The user's loss, the model's own, or cross-entropy of its logits.

        A sum with the number of tokens in it, or a mean without. Raises TraceError.
        """
        if self.loss is not None:
            return _sum_or_mean(self.loss(output, batch))
        model_loss = getattr(output, "loss", None)
        if isinstance(model_loss, torch.Tensor):
            return model_loss, None
        return cross_entropy(output, batch), None

    def forward(self, batch: object) -> object:
        """The output of the model on a batch."""
        if isinstance(batch, Mapping):
            # A cache of keys and values is for generation.
            no_cache = {"use_cache": False} if "use_cache" in self._parameters() else {}
            return self.module(**batch, **no_cache)
        if isinstance(batch, tuple | list):
            return self.module(*batch)
        return self.module(batch)

    def _input(self) -> str:
        return str(getattr(self.module, "main_input_name", TOKENS))

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.module.forward).parameters


def cross_entropy(output: object, batch: object) -> torch.Tensor:
    """The default loss: fp32 cross-entropy of logits [b, s, v] against labels, else token ids."""
    labels = batch.get(LABELS, batch) if isinstance(batch, Mapping) else batch
    logits, ids = _first(getattr(output, "logits", output)), _first(labels)
    return F.cross_entropy(logits.float().flatten(0, -2), ids.flatten())


def _sum_or_mean(loss: object) -> tuple[torch.Tensor, Number | None]:
    """What a user's loss returned."""
    if isinstance(loss, torch.Tensor):
        return loss, None
    if isinstance(loss, tuple | list) and len(loss) == 2:
        total, number = loss
        if isinstance(total, torch.Tensor) and isinstance(number, Number):
            return total, number
    raise TraceError(
        f"loss(output, batch) returned {_a_type(loss)}. Return a mean (a scalar tensor), or the "
        "pair (sum over tokens, number of tokens)."
    )


def _first(value: object) -> torch.Tensor:
    """A tensor, or the first one of several."""
    if isinstance(value, Mapping):
        value = next(iter(value.values()))
    if isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise TraceError(
            f"the default loss needs logits and token ids, found {_a_type(value)}. "
            "Define loss(output, batch) and make_batch(batch, seq)."
        )
    return value


def _sides(size: "int | tuple[int, int]") -> tuple[int, int]:
    """Height and width of an image or patch."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def load_model(source: Source, *, precision: Precision, attention: Attention) -> LoadedModel:
    """The model of a source on the meta device.

    Raises ModelError when the source does not give a model.
    """
    if isinstance(source, PythonSource):
        return _from_file(source, attention)
    module = _from_config(source.label, dict(source.config), precision, attention)
    return LoadedModel(module=module, name=source.name, make_batch=None, loss=None)


def _from_config(
    label: str, config: dict[str, Any], precision: Precision, attention: Attention
) -> nn.Module:
    # Kernels of a hub are code. What somebody sets in the environment is an answer to that.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    from huggingface_hub import constants
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.pop("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{label} has model_type {model_type!r}, which transformers does not know. "
            f"{did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)}"
        )
    kernel = {"attn_implementation": "eager"} if attention is Attention.MATH else {}
    try:
        # A configuration names no file of elsewhere that a model of it could need.
        with patch.object(constants, "HF_HUB_OFFLINE", True):
            known = AutoConfig.for_model(model_type, **config)
            build = _class_of(label, known)._from_config
            with torch.device("meta"), _bounded():
                model: nn.Module = build(known, dtype=DTYPES[precision], **kernel)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a model from {label}: {one_line(error)}"
        ) from error
    if (name := model.main_input_name) not in (TOKENS, IMAGES):
        raise ModelError(
            f"{label}: {type(model).__name__} takes {name}, which Mist cannot make up. Give a "
            "Python file with build_model() and make_batch(batch, seq)."
        )
    return model


@contextmanager
def _bounded() -> Iterator[None]:
    """Within: a model of more than `MOST_MODULES` modules is refused before memory is full."""
    count = 0

    def counted(module: nn.Module, name: str, part: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ModelError(f"the model has more than {MOST_MODULES:,} modules. Build fewer.")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _class_of(label: str, config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    """The class that the configuration names; if none, the first head that its type can have."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = getattr(config, "architectures", None) or []
    mappings = (getattr(modeling_auto, head) for head in HEADS)
    fitting = (mapping.get(config.model_type) for mapping in mappings)
    heads = (head[0] if isinstance(head, tuple) else head for head in fitting)
    for name in named or heads:
        model_class: type[PreTrainedModel] | None = getattr(transformers, name or "", None)
        if model_class is not None:
            return model_class
    wanted = f"class {', '.join(named)}" if named else "language model or image classifier"
    raise ModelError(
        f"{label}: transformers has no {wanted} for model_type {config.model_type!r}. Name one of "
        "its classes in `architectures`, or give a Python file with build_model()."
    )


def _from_file(source: PythonSource, attention: Attention) -> LoadedModel:
    namespace = vars(_run_file(source))
    build = namespace.get("build_model", namespace.get("model"))
    if build is None:
        raise ModelError(
            f"{source.label} defines neither build_model() nor model. "
            "Add a function build_model() that returns the torch.nn.Module to plan."
        )
    module = build if isinstance(build, nn.Module) else _build(source, build)
    choose_attention: Callable[[str], object] | None = getattr(
        module, "set_attn_implementation", None
    )
    if attention is Attention.MATH and choose_attention is not None:
        choose_attention("eager")
    return LoadedModel(
        module=module,
        name=str(namespace.get("name", source.name)),
        make_batch=namespace.get("make_batch"),
        loss=namespace.get("loss"),
    )


def _build(source: PythonSource, build: object) -> nn.Module:
    if not callable(build):
        raise ModelError(
            f"{source.label}: build_model is {_a_type(build)}, not a function that returns a "
            "torch.nn.Module."
        )
    try:
        with torch.device("meta"), _bounded():
            module = build()
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{source.label}: build_model() raised {one_line(error)}{_where(error, source.path)}."
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{source.label}: build_model() returned {_a_type(module)}, not a torch.nn.Module. "
            "Return the module itself."
        )
    return module


def _run_file(source: PythonSource) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mist_model_{source.path.stem}", source.path)
    assert spec is not None and spec.loader is not None, source.path
    namespace = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(namespace)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{source.label} cannot be imported: {one_line(error)}{_where(error, source.path)}."
        ) from error
    return namespace


@contextmanager
def local_modules(path: Path | None) -> Iterator[list[Path]]:
    """Within: modules in the folder of the model file can be imported by name.

    The list holds, afterwards, the files so imported; they are forgotten again, so that the next
    model does not get this one's.
    """
    files: list[Path] = []
    if path is None:
        yield files
        return
    folder = path.parent.resolve()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield files
    finally:
        sys.path.remove(str(folder))
        file_of = {name: _local_file(module, folder) for name, module in sys.modules.items()}
        files.extend(sorted({file for file in file_of.values() if file is not None}))
        for name in set(sys.modules) - before:
            if file_of[name] is not None:
                del sys.modules[name]


def _local_file(module: ModuleType, folder: Path) -> Path | None:
    """The file of a module that lies in the folder or below; installed ones and ours do not."""
    name = getattr(module, "__file__", None)
    file = Path(name).resolve() if isinstance(name, str) else None
    if file is None or not file.is_relative_to(folder) or file.is_relative_to(OURS):
        return None
    # torch gives some of its modules files that do not exist: "_classes.py" in any folder.
    return file if file.is_file() and "site-packages" not in file.parts else None


def _where(error: BaseException, path: Path) -> str:
    """The place in the user's file that an exception came through."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _a_type(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
