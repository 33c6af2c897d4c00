"""Initial weights of which a rank draws its own part: the same under every layout.

What a module does to its own parameters (`_init_weights` of Hugging Face, `reset_parameters` of
torch) is noted on tensors without memory. Where that is a list of draws and of operations on each
number by itself, as nearly all are, it is done again on blocks of rows, each from a generator of
its own, and only on those that the part touches. Whatever else a module does (orthogonal matrices)
is done as it is, on the whole parameter. CPU and CUDA draw other numbers from the same seed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from itertools import product
from math import prod
from typing import Any, Final, Protocol
from unittest.mock import patch

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mist.trace.dispatch_call import key_of, tensors_in

aten = torch.ops.aten

SPREAD: Final = 0.02  # of a matrix whose module does not say how it is initialised (GPT-2's)
BLOCK_ELEMENTS: Final = 1 << 20  # of a parameter that are drawn at once, at least a row

DRAWS: Final = frozenset({aten.normal_, aten.uniform_, aten.bernoulli_, aten.exponential_})
SETS: Final = frozenset({aten.zero_, aten.fill_})
EACH: Final = frozenset(
    {aten.mul_, aten.add_, aten.sub_, aten.div_, aten.erfinv_, aten.clamp_, aten.neg_, aten.exp_,
     aten.log_, aten.sqrt_, aten.abs_, aten.pow_}
)  # fmt: skip


class Whole(Protocol):
    """All of a parameter's value, in memory, in a file or drawn: indexing gives a part of it."""

    def __getitem__(self, bounds: tuple[slice, ...], /) -> torch.Tensor: ...


def seed_of(seed: int, *words: object) -> int:
    """A seed for one purpose, from the seed of the run."""
    text = "\n".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def initial_values(
    model: nn.Module, module_name: str, seed: int, device: torch.device
) -> Mapping[str, Whole]:
    """The initial values of a module's own parameters, by their names in it.

    `model`: the whole model on the meta device; it is left as it was. `device`: on which they are
    drawn.
    """
    module = model.get_submodule(module_name)
    steps = _steps_of(model, module_name)
    if steps is None:
        return _as_it_is(model, module_name, seed_of(seed, "weights", module_name))
    return {
        name: Drawn(
            shape=value.shape,
            dtype=value.dtype,
            device=device,
            steps=tuple(steps.get(name, ())),
            seed=seed_of(seed, "weights", module_name, name),
        )
        for name, value in module.named_parameters(recurse=False)
    }


def _steps_of(model: nn.Module, module_name: str) -> "Mapping[str, list[_Step]] | None":
    """What is done to a module's own parameters; None where that is not a list of known steps.

    On fake tensors: torch does nothing to some on the meta device.
    """
    module = model.get_submodule(module_name)
    with FakeTensorMode(allow_non_fake_inputs=True), _with_stand_ins(module) as parameters:
        notes = _Notes({key_of(value): (name, value.shape) for name, value in parameters.items()})
        try:
            with notes, patch.object(nn.init, "_no_grad_trunc_normal_", notes.truncated):
                initialise(model, module_name)
        except Exception:  # whatever needs numbers fails without them, and is done as it is
            return None
        is_intact = all(module._parameters[name] is value for name, value in parameters.items())
    return notes.steps if is_intact and notes.others is None else None


@contextmanager
def _with_stand_ins(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within: a module has stand-ins for its own parameters, on the CPU; they are returned."""
    before = dict(module.named_parameters(recurse=False))
    stand_ins = {
        name: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cpu"))
        for name, value in before.items()
    }
    module._parameters.update(stand_ins)
    try:
        with torch.no_grad():
            yield stand_ins
    finally:
        module._parameters.update(before)


def _as_it_is(model: nn.Module, module_name: str, seed: int) -> Mapping[str, torch.Tensor]:
    """What a module draws by itself, whole, on the CPU."""
    module = model.get_submodule(module_name)
    with _with_stand_ins(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialise(model, module_name)
        return {name: value.detach() for name, value in module.named_parameters(recurse=False)}


def initialise(model: nn.Module, module_name: str) -> None:
    """As the model says, as the module says, or ones for scales, zeros for shifts, else normal."""
    module = model.get_submodule(module_name)
    for name, value in module.named_parameters(recurse=False):
        if value.dim() > 1:
            value.normal_(std=SPREAD)
        else:
            value.fill_(0.0 if "bias" in name else 1.0)
    # Torch first, then transformers, which initialises again whatever it knows.
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    for each, init in _initialisers(model, module_name):
        init(each)


def _initialisers(
    model: nn.Module, module_name: str
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """The module and those around it, from the inside, each with `_init_weights` of its model.

    As in transformers: an outer module may set what lies in it (T5's attention its matrices), and a
    model within another one (a vision tower) has an `_init_weights` of its own.
    """
    names = module_name.split(".") if module_name else []
    path = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    inits = list(map(_init_weights, path))
    for depth in reversed(range(len(path))):
        # The nearest model's.
        init = next((each for each in reversed(inits[: depth + 1]) if each is not None), None)
        if init is not None:
            yield path[depth], init


def _init_weights(module: nn.Module) -> Callable[[nn.Module], None] | None:
    """The `_init_weights` of a module that takes any module; some take no argument."""
    init: Callable[[nn.Module], None] | None = getattr(module, "_init_weights", None)
    return init if init is not None and len(signature(init).parameters) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """An operation in place on a parameter, or on one `row`: an index of its first dimension.

    `draws`: whether it takes numbers from a generator.
    """

    func: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    row: int | None
    draws: bool


@dataclass
class _Notes(TorchDispatchMode):
    """Notes what is done to parameters (by storage); `others`: something that is not noted."""

    names: Mapping[int, tuple[str, torch.Size]]
    steps: dict[str, list[_Step]] = field(default_factory=dict)
    others: str | None = None

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets = [leaf for leaf in tensors_in((args, kwargs)) if key_of(leaf) in self.names]
        if not targets or func.is_view or func.namespace == "prim":  # prim: asks for the device
            return
        name, _ = self.names[key_of(targets[0])]
        numbers = not any(True for _ in tensors_in((args[1:], kwargs)))
        packet = func.overloadpacket
        if packet not in DRAWS | SETS | EACH or not numbers or kwargs.get("generator") is not None:
            self.others = f"{func} on {name}"
            return
        draws, sets = packet in DRAWS, packet in DRAWS | SETS
        self._add(targets[0], func, args[1:], kwargs, draws=draws, sets=sets)

    def truncated(self, tensor: torch.Tensor, *args: float, **kwargs: object) -> torch.Tensor:
        """Stands for torch's truncated normal numbers, which are drawn again until all fit."""
        self._add(tensor, nn.init.trunc_normal_, args, {}, draws=True, sets=True)
        return tensor

    def _add(  # noqa: PLR0913 - a step
        self,
        tensor: torch.Tensor,
        func: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        draws: bool,
        sets: bool,
    ) -> None:
        name, shape = self.names.get(key_of(tensor), ("", torch.Size()))
        row = _row_of(tensor, shape)
        if not name or row is False:
            self.others = self.others or f"{func} on a part of {name or 'something else'}"
            return
        done = self.steps.setdefault(name, [])
        if sets and row is None:  # nothing is left of what was there
            done.clear()
        done.append(_Step(func=func, args=args, kwargs=kwargs, row=row, draws=draws))


def _row_of(tensor: torch.Tensor, shape: torch.Size) -> int | None:
    """Which row of its parameter a view is; None: all of it; False: anything else."""
    if tensor.shape == shape and tensor.is_contiguous():
        return None
    if tensor.shape == shape[1:] and tensor.is_contiguous():
        return tensor.storage_offset() // prod(shape[1:])
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A parameter's initial value, drawn where it is asked for."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    steps: tuple[_Step, ...]
    seed: int

    def __getitem__(self, bounds: tuple[slice, ...]) -> torch.Tensor:
        ranges = [range(size)[each] for size, each in zip(self.shape, bounds, strict=True)]
        if not ranges:
            return self._block((), 0, 1).view(())
        out = torch.empty([len(each) for each in ranges], dtype=self.dtype, device=self.device)
        *leading, rows = ranges[: max(len(ranges) - 1, 1)]
        for place in product(*(enumerate(each) for each in leading)):
            self._fill(
                out[tuple(at for at, _ in place)],
                tuple(index for _, index in place),
                rows,
                tuple(slice(each.start, each.stop) for each in ranges[len(leading) + 1 :]),
            )
        return out

    def _fill(
        self, out: torch.Tensor, place: tuple[int, ...], rows: range, inner: tuple[slice, ...]
    ) -> None:
        """Draw `rows` of the matrix at `place` (an index of all dimensions but the last two)."""
        num_rows = self.shape[len(place)]
        size = max(BLOCK_ELEMENTS // prod(self.shape[len(place) + 1 :]), 1)
        first = rows.start // size * size
        for start in range(first, rows.stop, size):
            block = self._block(place, start, min(size, num_rows - start))
            begin, end = max(rows.start, start), min(rows.stop, start + block.shape[0])
            out[begin - rows.start : end - rows.start] = block[
                (slice(begin - start, end - start), *inner)
            ]

    def _block(self, place: tuple[int, ...], start: int, count: int) -> torch.Tensor:
        """Rows of a matrix, with all that is done to them."""
        sizes = (count, *self.shape[len(place) + 1 :]) if self.shape else (1,)
        block = torch.empty(sizes, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device)
        # By block, not by rank: a rank draws the blocks that its part touches, and gets the numbers
        # that it would get under any layout.
        generator.manual_seed(seed_of(self.seed, *place, start))
        with torch.no_grad():
            for step in self.steps:
                target = self._target(block, step.row, place, start)
                kwargs = {**step.kwargs, **({"generator": generator} if step.draws else {})}
                if target is not None:
                    step.func(target, *step.args, **kwargs)
        return block

    def _target(
        self, block: torch.Tensor, row: int | None, place: tuple[int, ...], start: int
    ) -> torch.Tensor | None:
        """What of a block a step is about; None: nothing."""
        if row is None:
            return block
        if place:
            return block if place[0] == row else None
        return block[row - start] if start <= row < start + block.shape[0] else None
