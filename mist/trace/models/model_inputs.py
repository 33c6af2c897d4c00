"""The input of a model that brings none: what its own signature and configuration ask for.

Values do not matter, so ids and labels may be one tensor. Shapes do: [b, s] for what has a label
per token, [b] for what has one per sample, the sizes of the configuration for images and sound.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn

from mist.errors import ModelError
from mist.trace.expressions import Size
from mist.trace.models.image_inputs import IMAGES, RGB, TYPES, image_inputs, image_size, sides

TOKENS, SOUND, WAVES = "input_ids", "input_features", "input_values"
LABELS: Final = "labels"
SPANS: Final = ("start_positions", "end_positions")
TARGETS: Final = ("targets", "labels", "target")  # in hand-written forward functions
PER_SAMPLE: Final = (
    "ForSequenceClassification", "ForAudioClassification", "ForNextSentencePrediction",
)  # fmt: skip
PER_PIXEL: Final = "ForSemanticSegmentation"
REGRESSION: Final = 1  # a classifier with one label is none

# What a configuration must say of the sizes of an input: one of these.
SIZES: Final[Mapping[str, Sequence[Sequence[str]]]] = MappingProxyType(
    {
        TOKENS: [()],
        IMAGES: [()],
        SOUND: [("num_mel_bins", "max_source_positions")],
        WAVES: [("conv_kernel", "conv_stride"), ("max_length", "num_mel_bins")],
    }
)

Batch = dict[str, object]


def main_input(module: nn.Module) -> str:
    """The name of what a model reads first."""
    return str(getattr(module, "main_input_name", TOKENS))


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of its forward function, by name."""
    return inspect.signature(module.forward).parameters


def looks_at_images(module: nn.Module) -> bool:
    """Whether a model of texts takes images that its texts may hold."""
    asked = parameters_of(module)
    is_text = main_input(module) == TOKENS and TOKENS in asked and "return_loss" not in asked
    return is_text and IMAGES in asked and hasattr(getattr(module, "config", None), "vision_config")


def default_batch(module: nn.Module, batch: Size, seq: Size, images: int) -> object:
    """One micro-batch of `batch` samples of `seq` tokens, in the form that `module` takes.

    `images`: of a sample, where the model looks at images that texts hold.
    """
    asked = parameters_of(module)
    if main_input(module) == IMAGES and TOKENS not in asked:
        return _images(module, batch)
    ids = torch.empty(batch, seq, dtype=torch.int64)
    if not hasattr(module, "loss_function"):
        return _by_hand(asked, ids)
    if main_input(module) == SOUND:
        return {SOUND: _sound(module.config, batch), LABELS: ids}
    if main_input(module) == WAVES:
        return {WAVES: _waves(module.config, batch, seq), **_labels(module, asked, ids)}
    inputs = _texts(module, asked, ids, images)
    labels = {} if "return_loss" in inputs else _labels(module, asked, ids)
    return inputs | labels if labels or len(inputs) > 1 else ids


def _texts(
    module: nn.Module, asked: Mapping[str, inspect.Parameter], ids: torch.Tensor, images: int
) -> Batch:
    """What a text model of Hugging Face reads, with an image for each text where it takes one."""
    inputs: Batch = {TOKENS: ids}
    if images:
        inputs |= image_inputs(module, asked, ids.shape[0], images)
        inputs |= {name: torch.zeros_like(ids) for name in TYPES if name in asked}
    if "return_loss" in asked:  # pairs of a text and an image
        return inputs | {IMAGES: _pixels(module.config, ids.shape[0]), "return_loss": True}
    if main_input(module) == IMAGES:  # a text about an image
        inputs[IMAGES] = _pixels(module.config, ids.shape[0])
    if "decoder_input_ids" in asked:
        inputs["decoder_input_ids"] = ids
    return inputs


def _by_hand(asked: Mapping[str, inspect.Parameter], ids: torch.Tensor) -> object:
    """Of a model that is none of Hugging Face: its ids, and the targets that it asks for."""
    target = next((name for name in TARGETS if name in asked), None)
    first = next(iter(asked), None)
    return ids if target in (None, first) else {first: ids, target: ids}


def _labels(module: nn.Module, asked: Mapping[str, inspect.Parameter], ids: torch.Tensor) -> Batch:
    """What a text model is to say, in the shape of its head."""
    sample = torch.empty(ids.shape[0], dtype=torch.int64)
    if all(name in asked for name in SPANS):
        return dict.fromkeys(SPANS, sample)
    if LABELS not in asked:
        return {}
    if type(module).__name__.endswith(PER_SAMPLE):
        config: Any = module.config
        if config.problem_type == "multi_label_classification":
            return {LABELS: torch.empty(ids.shape[0], config.num_labels)}
        return {LABELS: sample.float() if config.num_labels == REGRESSION else sample}
    return {LABELS: ids}


def _images(module: nn.Module, batch: Size) -> Batch:
    """One image a sample, with a label where one is asked for."""
    pixels = _pixels(module.config, batch)
    if LABELS not in parameters_of(module):
        return {IMAGES: pixels}
    per_pixel = type(module).__name__.endswith(PER_PIXEL)
    shape = (batch, *pixels.shape[2:]) if per_pixel else (batch,)
    return {IMAGES: pixels, LABELS: torch.empty(shape, dtype=torch.int64)}


def _pixels(config: object, batch: Size) -> torch.Tensor:
    """An image for each sample, [b, channels, height, width], of the size of the configuration."""
    parts = (getattr(config, name, None) for name in ("vision_config", "backbone_config"))
    of_images = next((part for part in parts if part is not None), config)
    channels = getattr(of_images, "num_channels", RGB)
    return torch.empty(batch, channels, *sides(image_size(of_images)))


def _sound(config: Any, batch: Size) -> torch.Tensor:  # noqa: ANN401 (any configuration)
    """Log-mel frames [b, mel bins, frames]: two frames for each position of the encoder."""
    return torch.empty(batch, config.num_mel_bins, 2 * config.max_source_positions)


def _waves(config: Any, batch: Size, seq: Size) -> torch.Tensor:  # noqa: ANN401 (any configuration)
    """Samples [b, samples], just enough for `seq` positions behind the convolutions.

    Of a model without these it is a spectrogram [b, frames, mel bins] of a fixed size.
    """
    if not hasattr(config, "conv_stride"):
        return torch.empty(batch, config.max_length, config.num_mel_bins)
    samples = seq
    for kernel, stride in reversed([*zip(config.conv_kernel, config.conv_stride, strict=True)]):
        samples = (samples - 1) * stride + kernel
    return torch.empty(batch, samples)


def refuse_unknown_input(label: str, model: nn.Module) -> None:
    """Raise ModelError for a model whose input cannot be made up."""
    name, config = main_input(model), getattr(model, "config", None)
    if any(all(hasattr(config, size) for size in sizes) for sizes in SIZES.get(name, ())):
        return
    raise ModelError(
        f"{label}: {type(model).__name__} takes {name}, which Mist cannot make up. Give a "
        "Python file with build_model() and make_batch(batch, seq)."
    )
