"""What a model does around its layers, found by running it once on fake tensors.

A pipeline stage runs the model's own forward with other layers taken out (`split`). For that it
must be known in which order the layers are called, what a layer passes on, and which parameters are
read before the first layer (front) and after the last one (tail).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from mist.plans.workload import Attention, Precision
from mist.trace.dispatch_call import tensors_in
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.recording.layer_dependencies import Handovers
from mist.trace.recording.shim import runs_anywhere
from mist.trace.repeated_blocks import Layers, find_layers
from mist.trace.runs import traced_layers

NUM_SAMPLES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutput:
    """What a layer returns: leaves of a tree, of which number `place` is the activation.

    Other tensors (scores of attention) are left out: None.
    """

    layout: TreeSpec
    leaves: tuple[object, ...]
    place: int

    @classmethod
    def of(cls, output: object) -> "LayerOutput":
        """The form of a result, whose first tensor is the activation."""
        leaves, layout = tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        plain = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        return cls(layout=layout, leaves=plain, place=places[0])

    def around(self, hidden: torch.Tensor) -> object:
        """The result with this activation."""
        leaves = [*self.leaves]
        leaves[self.place] = hidden
        return tree_unflatten(leaves, self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStructure:
    """Names of the layers in the order of their calls, and of what is read before and after.

    `num_calls`: how often they are called, which are the layers of a plan; more than there are
    where some are called again. `boundary`: shape of one sample of the activation between layers.
    `outputs`: what each of them returns.
    `direct`: the embedding, if layer 0 takes what it gave as it is.
    `unstaged`: why stages cannot divide the layers (`Handovers`); None if they can.
    `tied`: for each name under which a parameter appears again, its first name.
    """

    layers: tuple[str, ...]
    num_calls: int
    front: frozenset[str]
    tail: frozenset[str]
    boundary: tuple[int, ...]
    outputs: tuple[LayerOutput, ...]
    unstaged: str | None
    direct: str | None
    tied: Mapping[str, str]


def examine(loaded: LoadedModel, seq_len: int) -> ModelStructure:
    """Run a model on fake tensors. One without layers is a layer as a whole. Raises TraceError."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = deepcopy(loaded.module)
    # On the CPU: on the meta device some functions (attention) run other operations.
    with mode:
        model.to_empty(device="cpu")
    for parameter in model.parameters():  # what takes what from which shows by gradients
        parameter.requires_grad_(parameter.is_floating_point())
    layers = find_layers(model)
    while layers is not None:
        watch = _watched(replace(loaded, module=model), layers, mode, seq_len)
        if sorted(watch.order) == list(range(len(layers.modules))):
            return _structure(loaded.module, watch)
        # A list with a layer that is not called once (experts, heads) is no stack: look for
        # another.
        layers = layers.without(_not_once(watch, layers))
    layers = _called_again(loaded, model, seq_len)
    return _structure(loaded.module, _watched(replace(loaded, module=model), layers, mode, seq_len))


def _watched(fake: LoadedModel, layers: Layers, mode: FakeTensorMode, seq_len: int) -> "_Watch":
    """A run of a fake model in which these layers are watched."""
    watch = _Watch(model=fake.module, layers=layers)
    with mode, runs_anywhere(fake.module), watch.hooks():
        watch.handovers.ends(fake.run(fake.batch(NUM_SAMPLES, seq_len)))
    return watch


def _called_again(loaded: LoadedModel, model: nn.Module, seq_len: int) -> Layers:
    """The layers of a model (in its copy) that are called more than once; else all of it is one."""
    setting = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, seq_len=seq_len)
    shared = traced_layers(loaded, setting)
    if shared is None:
        return Layers(modules=(model,), signatures=((),), lists=(0,))
    names = {module: name for name, module in loaded.module.named_modules()}
    return replace(shared, modules=tuple(model.get_submodule(names[m]) for m in shared.modules))


def beginnings(layers: Iterable[str]) -> tuple[str, ...]:
    """What the names of all that is in these layers begin with."""
    return tuple(f"{name}." if name else "" for name in layers)


def _not_once(watch: "_Watch", layers: Layers) -> int:
    """The list of the first layer that is not called exactly once."""
    counts = [watch.order.count(i) for i in range(len(layers.modules))]
    return layers.lists[next(i for i, count in enumerate(counts) if count != 1)]


@dataclass(kw_only=True, eq=False)
class _Watch(TorchFunctionMode):
    """Notes what layers are given and give, and which parameters are read around them."""

    model: nn.Module
    layers: Layers
    order: list[int] = field(default_factory=list)
    front: set[int] = field(default_factory=set)
    tail: set[int] = field(default_factory=set)
    hidden: torch.Tensor | None = None
    embedded: dict[int, tuple[torch.Tensor, nn.Module]] = field(default_factory=dict)
    direct: nn.Module | None = None
    outputs: list[LayerOutput] = field(default_factory=list)
    handovers: Handovers = field(default_factory=Handovers)
    inside: bool = False

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if not self.inside:
            leaves = tree_leaves((args, kwargs))
            self._read({id(x) for x in leaves if isinstance(x, nn.Parameter)})
        return func(*args, **(kwargs or {}))

    def _read(self, parameters: set[int]) -> None:
        """Parameters that are read outside the layers."""
        if not self.order:
            self.front |= parameters
            return
        self.tail |= parameters

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers.modules):
                before = layer.register_forward_pre_hook(self._enter(index), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(layer.register_forward_hook(self._leave).remove)
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(self._embed).remove)
            stack.enter_context(self)
            yield

    def _embed(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        # The output is held so that no later tensor gets its identity.
        self.embedded[id(output)] = (output, module)

    def _enter(self, index: int) -> Callable[..., None]:
        def enter(
            module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
        ) -> None:
            tensors = list(tensors_in((args, kwargs)))
            if not self.order and id(tensors[0]) in self.embedded:
                self.direct = self.embedded[id(tensors[0])][1]
            self.handovers.enters(tensors, again=index in self.order)
            self.order.append(index)
            self.inside = True

        return enter

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self.inside = False
        self.outputs.append(LayerOutput.of(output))
        tensors = list(tensors_in(output))
        self.hidden = tensors[0]
        self.handovers.leaves(tensors, by_sample=self.hidden.shape[:1] == (NUM_SAMPLES,))


def _structure(original: nn.Module, watch: _Watch) -> ModelStructure:
    """Ties are those of the original: a copy on another device has none."""
    copy = watch.model
    names = {id(module): name for name, module in copy.named_modules()}
    first = {id(parameter): name for name, parameter in original.named_parameters()}
    every = dict(original.named_parameters(remove_duplicate=False))
    tied = {name: first[id(p)] for name, p in every.items() if first[id(p)] != name}
    inside = {id(p) for layer in watch.layers.modules for p in layer.parameters()}
    outside = {
        id(p): tied.get(name, name)
        for name, p in copy.named_parameters(remove_duplicate=False)
        if id(p) not in inside
    }
    assert watch.hidden is not None
    return ModelStructure(
        layers=tuple(names[id(watch.layers.modules[i])] for i in dict.fromkeys(watch.order)),
        num_calls=len(watch.order),
        front=frozenset(outside[key] for key in watch.front & outside.keys()),
        tail=frozenset(outside[key] for key in watch.tail & outside.keys()),
        boundary=tuple(watch.hidden.shape[1:]),
        outputs=tuple(watch.outputs),
        unstaged=watch.handovers.fault,
        direct=names[id(watch.direct)] if watch.direct is not None else None,
        tied=tied,
    )
