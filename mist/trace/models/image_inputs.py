"""Images for a text model that looks at some: in the form that its own signature asks for.

All have one size: that of the configuration, or a usual one where a model takes any.
"""

from collections.abc import Mapping
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mist.trace.expressions import Size
from mist.trace.operations.equal_images import equal_images

IMAGES, GRIDS = "pixel_values", "image_grid_thw"
TYPES: Final = ("token_type_ids", "mm_token_type_ids")  # 1 for a token of an image
FEATURES: Final = "get_image_features"  # a method: what stands in the places of image tokens
TOKENS: Final = ("image_token_id", "image_token_index")
RGB: Final = 3  # channels, of models that do not say
IMAGE_SIDE: Final = 224  # pixels, of models that take any size
PACKED_SIDE: Final = 448  # pixels, of those that take patches of any number of images in one list

Batch = dict[str, torch.Tensor]
Asked = Mapping[str, Parameter]


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image or patch, in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_size(config: object) -> int | tuple[int, int]:
    """The image that a configuration is made for; the usual one where it takes any."""
    found: int | tuple[int, int] | None = getattr(config, "image_size", None)
    return IMAGE_SIDE if found is None else found


def image_inputs(module: nn.Module, asked: Asked, batch: Size, images: int) -> Batch:
    """`images` for each of `batch` samples, with what says of which size they are."""
    config = _config_of(module).vision_config
    if GRIDS in asked:
        return _packed(config, batch * images)
    channels = _number(config, "num_channels", "in_channels", "in_chans") or RGB
    shape = (channels, *sides(image_size(config)))
    if "aspect_ratio_ids" in asked:
        tiles = config.max_num_tiles
        return {
            IMAGES: torch.empty(batch, images, tiles, *shape),
            "aspect_ratio_ids": torch.ones(batch, images, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(batch, images, tiles, dtype=torch.int64),
        }
    if "pixel_attention_mask" in asked:
        return {IMAGES: torch.empty(batch, images, *shape)}
    return {IMAGES: torch.empty(batch * images, *shape)}


def image_tokens(module: nn.Module, images: int) -> int:
    """How many tokens of a sample stand for its `images`: as many as the model makes of them."""
    if not hasattr(module, FEATURES):  # it reads images in layers of their own
        return 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = deepcopy(module)
    with mode, torch.no_grad():
        fake.to_empty(device="cpu")
        asked = signature(fake.forward).parameters
        inputs = image_inputs(fake, asked, 1, images)
        # Not every model casts its images.
        dtype = next(p.dtype for p in fake.parameters() if p.is_floating_point())
        inputs[IMAGES] = inputs[IMAGES].to(dtype)
        features: Any = getattr(fake, FEATURES)
        grid = grid_of(_config_of(fake).vision_config) if GRIDS in inputs else None
        with equal_images(fake.modules(), inputs, grid):
            found: Any = features(**inputs, return_dict=True)
    pooled = getattr(found, "pooler_output", None)
    rows = tree_leaves(found.last_hidden_state if pooled is None else pooled)
    return sum(each.numel() // each.shape[-1] for each in rows)


def placed(
    module: nn.Module, batch: Batch, ids: torch.Tensor, images: int
) -> dict[str, torch.Tensor]:
    """A batch with token ids [b, s]: the first tokens of each sample stand for its images."""
    config = _config_of(module)
    number, token = image_tokens(module, images), _number(config, *TOKENS)
    stands = torch.zeros_like(ids)
    if number and token is not None:
        ids = torch.where(ids == token, (token + 1) % config.get_text_config().vocab_size, ids)
        ids[:, :number], stands[:, :number] = token, 1
    types = dict.fromkeys(TYPES, stands)
    return {
        name: types.get(name, ids) if leaf.shape == ids.shape else leaf
        for name, leaf in batch.items()
    }


def grid_of(config: object) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of an image."""
    side = getattr(config, "image_size", None) or PACKED_SIDE
    rows, columns = (length // config.patch_size for length in sides(side))  # type: ignore[attr-defined]
    return 1, rows, columns


def _packed(config: object, number: Size) -> Batch:
    """Patches of all images in one list [patches, values], and the grid of each image."""
    _, rows, columns = grid = grid_of(config)
    channels = _number(config, "in_channels", "in_chans", "num_channels") or RGB
    frames = _number(config, "temporal_patch_size") or 1
    values = channels * frames * config.patch_size**2  # type: ignore[attr-defined]
    return {
        IMAGES: torch.empty(number * rows * columns, values),
        GRIDS: torch.tensor([grid]).expand(number, len(grid)),
    }


def _config_of(module: nn.Module) -> Any:  # noqa: ANN401 (any configuration)
    return module.config


def _number(config: object, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
