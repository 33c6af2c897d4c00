"""From the fields of a Hugging Face configuration to a model on the meta device."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mist.errors import ModelError, did_you_mean
from mist.plans.workload import Attention
from mist.trace.diagnose import one_line
from mist.trace.models.model_inputs import refuse_unknown_input
from mist.trace.models.source import without_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What a configuration without `architectures` is for: the first of these heads that it can have.
HEADS: Final = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
)
ANY_HEADS: Final = (*HEADS, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_MAPPING_NAMES")
# Whether a layer runs (LayerDrop), which tokens are masked (SpecAugment): off where they are this.
BY_CHANCE: Final = MappingProxyType(
    dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0)
    | {"apply_spec_augment": False}
)
MOST_MODULES: Final = 2**18  # a model with a module for each of its 15,000 experts has a third
QUANTIZED: Final = (
    "quantization_config says how weights are stored for use: the model is planned as it is "
    "trained, with every weight in the compute precision. For adapters on stored weights give a "
    "Python file whose build_model() makes both"
)
NAMED_KERNELS: Final = (
    "the attention kernels that the configuration names are left out: --attention says which "
    "attention is planned"
)


def model_of(
    label: str, config: dict[str, Any], attention: Attention
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model of a configuration, with notes on how it was read. Raises ModelError."""
    # Kernels of a hub are code. What somebody sets in the environment is an answer to that.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    from huggingface_hub import constants
    from transformers import AutoConfig

    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(
            f"{label} has architectures {named!r:.80}: expected a list of class names."
        )
    model_type, notes = _model_type(label, config.pop("model_type"), named)
    if config.pop("quantization_config", None):
        notes += (QUANTIZED,)
    if (plain := without_kernels(config)) != config:
        config, notes = plain, (*notes, NAMED_KERNELS)
    kernel = {"attn_implementation": "eager"} if attention is Attention.MATH else {}
    try:
        # A configuration names no file of elsewhere that a model of it could need. What libraries
        # warn of, older names of settings or parts of size 0, is no news to who plans.
        offline = patch.object(constants, "HF_HUB_OFFLINE", True)
        with offline, warnings.catch_warnings(action="ignore"):
            known = AutoConfig.for_model(model_type, **config)
            notes += tuple(_switch_off_chance(known))
            model_class, more = _class_of(label, known)
            if getattr(known, "pad_token_id", None) is None:
                known.pad_token_id = 0  # classifiers look for the last token that is no padding
            with torch.device("meta"), bounded_modules():
                model: nn.Module = model_class._from_config(known, dtype=torch.float32, **kernel)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a model from {label}: {one_line(error)}"
        ) from error
    refuse_unknown_input(label, model)
    return model, (*notes, *more)


def _switch_off_chance(config: "PreTrainedConfig") -> Iterator[str]:
    """Switch off what a draw decides in each forward, in place; notes."""
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name, off in BY_CHANCE.items():
            if value := getattr(each, name, off):
                setattr(each, name, off)
                yield f"{name} {value} is read as {off}: all layers run, on all tokens"


@contextmanager
def bounded_modules() -> Iterator[None]:
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


def _model_type(label: str, found: str, named: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The type that transformers knows a model by: its own, or that of a class that it names."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if found in CONFIG_MAPPING_NAMES:
        return found, ()
    for name in named:
        known = getattr(getattr(transformers, name, None), "config_class", None)
        if known is not None:
            note = (
                f"model_type {found!r} is not in transformers: read as {known.model_type!r}, whose "
                f"architecture {name} it names"
            )
            return known.model_type, (note,)
    raise ModelError(
        f"{label} has model_type {found!r}, which transformers does not know. "
        f"{did_you_mean(found, CONFIG_MAPPING_NAMES)}"
    )


def _class_of(
    label: str, config: "PreTrainedConfig"
) -> "tuple[type[PreTrainedModel], tuple[str, ...]]":
    """The class that the configuration names, else the first head that its type can have."""
    import transformers

    named = getattr(config, "architectures", None) or []
    heads = _heads(config, named)
    for name in (*named, *heads):
        model_class: type[PreTrainedModel] | None = getattr(transformers, name or "", None)
        if model_class is not None:
            missing = f"transformers has no {', '.join(named)}: read as {name}"
            return model_class, () if not named or name in named else (missing,)
    wanted = f"class {', '.join(named)}" if named else "language model or classifier"
    known = ", ".join(dict.fromkeys(name for name in _of_type(config, ANY_HEADS) if name))
    raise ModelError(
        f"{label}: transformers has no {wanted} for model_type {config.model_type!r}. Name one of "
        f"its classes in `architectures` ({known}), or give a Python file with build_model()."
    )


def _heads(config: "PreTrainedConfig", named: Sequence[str]) -> Iterator[str | None]:
    """The classes of a model's type, by what they are for, where none is named."""
    # A class that comes with the weights (auto_map) is another name for one of its type's; one that
    # nobody has is a mistake.
    candidates = HEADS if not named else ANY_HEADS if getattr(config, "auto_map", None) else ()
    return _of_type(config, candidates)


def _of_type(config: "PreTrainedConfig", candidates: Sequence[str]) -> Iterator[str | None]:
    """The classes that a model's type has in some of transformers' lists."""
    from transformers.models.auto import modeling_auto

    fitting = (getattr(modeling_auto, head).get(config.model_type) for head in candidates)
    return (head[0] if isinstance(head, tuple) else head for head in fitting)
