"""From a resolved source to a model on the meta device, and how to run it on a batch."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from mist.errors import ModelError, TraceError
from mist.plans.workload import Attention
from mist.trace.diagnose import one_line
from mist.trace.expressions import Size
from mist.trace.models.adapters import add_adapters
from mist.trace.models.configurations import bounded_modules, model_of
from mist.trace.models.image_inputs import GRIDS, IMAGES, image_size, image_tokens, sides
from mist.trace.models.meta_device import StaysOnMeta
from mist.trace.models.model_inputs import (
    LABELS,
    default_batch,
    looks_at_images,
    main_input,
    parameters_of,
)
from mist.trace.models.source import MAX_SEQ_LEN_NAMES, PythonSource, Source
from mist.trace.models.watched_batch import WatchedBatch
from mist.trace.operations.equal_images import equal_images

MakeBatch = Callable[[Size, Size], object]
Number = int | float | torch.SymInt | torch.Tensor
Loss = Callable[..., object]  # a mean, or the pair (sum over tokens, number of tokens)

USUAL_SEQ_LEN: Final = 512  # tokens, of a batch that is looked at for its images
OURS: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A module with its name, its input and its loss; `make_batch` and `loss` are the user's.

    `notes`: how its description was read where that is not plain. `images`: of a sample.
    """

    module: nn.Module
    name: str
    make_batch: MakeBatch | None
    loss: Loss | None
    notes: tuple[str, ...] = ()
    images: int = 0

    @property
    def takes_images(self) -> bool:
        """Whether a number of images can be asked for."""
        return self.make_batch is None and looks_at_images(self.module)

    @property
    def image_tokens(self) -> int:
        """How many tokens of a sample stand for its images."""
        return image_tokens(self.module, self.images) if self.images else 0

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model takes, if it says so; of an image, its patches."""
        config: Any = getattr(self.module, "config", None)
        if main_input(self.module) == IMAGES and (patch := getattr(config, "patch_size", None)):
            pairs = zip(sides(image_size(config)), sides(patch), strict=True)
            return prod(image // part for image, part in pairs)
        for owner in (self.module, config, getattr(config, "text_config", None)):
            for name in MAX_SEQ_LEN_NAMES:
                value = getattr(owner, name, None)
                if isinstance(value, int):
                    return value
        return None

    def batch(self, batch: Size, seq: Size) -> object:
        """One micro-batch: the user's, or what the model's own signature asks for."""
        if self.make_batch is not None:
            return self.make_batch(batch, seq)
        return default_batch(self.module, batch, seq, self.images)

    def is_one_size(self, seq: int) -> bool:
        """Whether a sample has one size, whatever the sequence length (at `seq` and at half)."""
        try:
            with FakeTensorMode():
                whole, half = (tree_leaves(self.batch(2, tokens)) for tokens in (seq, seq // 2))
        except Exception:  # a length that the user's function does not take
            return False
        return [getattr(x, "shape", x) for x in whole] == [getattr(x, "shape", x) for x in half]

    def run(self, batch: object) -> torch.Tensor:
        """Forward and mean loss, as one process has them.

        Raises TraceError for an entry of a batch that neither of the two reads.
        """
        output = self.forward(batch)
        if isinstance(batch, Mapping):
            seen = WatchedBatch(batch)
            loss, number = self.loss_of(output, seen)
            self._refuse_unread(seen.unread - _taken(batch, parameters_of(self.module)).keys())
        else:
            loss, number = self.loss_of(output, batch)
        return loss if number is None else loss / number

    def _refuse_unread(self, unread: AbstractSet[str]) -> None:
        if unread:
            raise TraceError(
                f"make_batch gives {', '.join(sorted(map(repr, unread)))}, which neither forward "
                f"nor the loss of {self.name} reads. The arguments of forward are "
                f"{', '.join(parameters_of(self.module))}."
            )

    def map_inputs(self, function: Callable[[object], object], batch: object) -> object:
        """A batch with `function` of every leaf that `forward` takes; the rest is for the loss."""
        if not isinstance(batch, Mapping):
            return tree_map(function, batch)
        return {**batch, **tree_map(function, _taken(batch, parameters_of(self.module)))}

    def loss_of(self, output: object, batch: object) -> tuple[torch.Tensor, Number | None]:
        """The user's loss, the model's own, or cross-entropy of its logits.

        A sum with the number of tokens in it, or a mean without. Raises TraceError.
        """
        if self.loss is not None:
            return _sum_or_mean(self.loss(output, batch))
        model_loss = _own_loss(output)
        if model_loss is not None:
            return model_loss, None
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, torch.Tensor):  # a model without a head has nothing to be right about
            return hidden.float().square().mean(), None
        return cross_entropy(output, batch), None

    def forward(self, batch: object) -> object:
        """The output of the model on a batch."""
        with _without_cache(self.module), self._equal_images(batch):
            if isinstance(batch, Mapping):
                asked = parameters_of(self.module)
                no_cache = {"use_cache": False} if "use_cache" in asked else {}
                return self.module(**_taken(batch, asked), **no_cache)
            if isinstance(batch, tuple | list):
                return self.module(*batch)
            return self.module(batch)

    @contextmanager
    def _equal_images(self, batch: object) -> Iterator[None]:
        """Within: the model knows that the images of fake tensors have one size."""
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(batch))
        if not isinstance(batch, Mapping) or IMAGES not in batch or not is_fake:
            yield
            return
        grid = None
        if GRIDS in batch:
            with _disable_current_modes():
                known = self.batch(1, USUAL_SEQ_LEN)
                assert isinstance(known, Mapping)
                grid = known[GRIDS][0].tolist()
        with equal_images(self.module.modules(), batch, grid):
            yield


def _taken(
    batch: Mapping[str, object], asked: Mapping[str, inspect.Parameter]
) -> dict[str, object]:
    """What of a batch is among the arguments that a forward function asks for."""
    if any(each.kind is each.VAR_KEYWORD for each in asked.values()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name in asked}


@contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """Within: configurations ask for no cache of keys, values and states: that is for generation.

    Not every model that has one takes it as an argument of its own.
    """
    configs = {id(c): c for c in (getattr(m, "config", None) for m in module.modules())}.values()
    with ExitStack() as stack:
        for config in configs:
            if getattr(config, "use_cache", None) is True:
                stack.enter_context(patch.object(config, "use_cache", False))
        yield


def _own_loss(output: object) -> torch.Tensor | None:
    """The loss in an output: its `loss`, or the scalar of a tuple (logits, loss)."""
    several = output if type(output) is tuple else (getattr(output, "loss", None),)
    scalars = (each for each in several if isinstance(each, torch.Tensor) and each.dim() == 0)
    return next(scalars, None)


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


def load_model(source: Source, *, attention: Attention, images: int | None = None) -> LoadedModel:
    """The model of a source on the meta device, one of a configuration in fp32.

    What runs it casts parameters; buffers stay as they are (FSDP2's mixed precision).

    `images`: of a sample, where it looks at images that texts hold; None: one.

    Raises ModelError when the source does not give a model, or one without images.
    """
    if isinstance(source, PythonSource):
        model = _from_file(source, attention)
    else:
        module, notes = model_of(source.label, dict(source.config), attention)
        if source.adapter_rank:
            add_adapters(module, source.adapter_rank)
        model = LoadedModel(
            module=module, name=source.name, make_batch=None, loss=None, notes=notes
        )
    if images and not model.takes_images:
        raise ModelError(
            f"--images {images}: {source.label} gives no model of texts that looks at images. "
            "Leave it out; what a file's make_batch(batch, seq) returns is taken as it is."
        )
    return replace(model, images=int(model.takes_images) if images is None else images)


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
    with (
        _blamed(source, ": build_model() raised"),
        torch.device("meta"),
        StaysOnMeta(),
        bounded_modules(),
    ):
        module = build()
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
    with _blamed(source, " cannot be imported:"):
        spec.loader.exec_module(namespace)
    return namespace


@contextmanager
def _blamed(source: PythonSource, words: str) -> Iterator[None]:
    """Within: whatever the user's file raises is a ModelError that begins with `words`.

    A call of sys.exit() and exceptions beyond Exception too; Ctrl-C stays what it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = _where(error, source.path)
        raise ModelError(f"{source.label}{words} {one_line(error)}{place}.") from error


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
    file = _resolved(name) if isinstance(name, str) else None
    if file is None or not file.is_relative_to(folder) or file.is_relative_to(OURS):
        return None
    # torch gives some of its modules files that do not exist: "_classes.py" in any folder.
    return file if file.is_file() and "site-packages" not in file.parts else None


@cache
def _resolved(name: str) -> Path:
    """Of thousands of modules, and again at every load: that takes longer than small traces."""
    return Path(name).resolve()


def _where(error: BaseException, path: Path) -> str:
    """The place in the user's file that an exception came through."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})" if error.lineno else ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _a_type(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
