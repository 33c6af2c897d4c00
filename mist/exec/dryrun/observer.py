"""The memory of a rank at each instant of a step, by purpose: a recorder that knows torch.

A storage belongs to what runs when it is made: FSDP2 gathers or reduces, a layer runs forward, the
model's ends, a backward pass (working memory), the optimizer. What autograd made and FSDP2 then
keeps is noted again as gradients.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from mist.exec.build.adamw import AdamW, local
from mist.exec.build.parallel import Built, Parallel
from mist.exec.build.pipeline import Stage
from mist.exec.build.step_recorder import Rows, StepRecorder
from mist.exec.observation import Moment

LOSS: Final = "logits and loss"
NORM, OPTIMIZER = "norm", "optimizer"  # the phases after the gradients
WAIT: Final = torch.ops._c10d_functional.wait_tensor.default
LAYER: Final = "layer "  # begins the name of what layers keep: "layer 3"


@dataclass(slots=True, kw_only=True)
class Peak:
    """The instant of the peak: bytes by part, and where it was."""

    parts_bytes: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    module: str = ""
    operation: str = ""


class Observer(StepRecorder):
    """Records one step of `parallel` on the CPU, real or fake; see `StepRecorder`.

    `ends`: after each backward pass, the collectives so far. `pins`: count host memory as a GPU
    would have it, pinned.
    """

    def __init__(self, parallel: Parallel, *, pins: bool = False) -> None:
        self._tags: dict[int, str] = {}
        self._by_tag: Counter[str] = Counter()
        self._tag = "buffers"
        self._operation = ""
        self.phase, self.module = "forward", ""
        self.peak = Peak()
        self.timeline: list[Moment] = []
        self.ends: list[Rows] = []
        self._since = 0
        self._paused = False
        super().__init__((), parallel.axes)
        self._pins = pins
        for tag, tensors in parallel.states(on_host=False).items():
            with self.tagged(tag):
                for tensor in tensors:
                    self._count(tensor.untyped_storage())
        self.static_bytes = self._bytes
        for tag, tensors in parallel.states(on_host=True).items():
            # Moments are as large as they are (`Swapper.zeros_on_host`).
            with self.on_host(), patch.object(self, "_pins", pins and tag != "optimizer"):
                for tensor in tensors:
                    self._count(tensor.untyped_storage())

    @property
    def peak_bytes(self) -> int:
        """The most that the device held."""
        return self._peak

    @property
    def host_peak_bytes(self) -> int:
        """The most that host memory held."""
        return self._host_peak

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: new storages have no memory."""
        with patch.object(self, "_paused", True):
            yield

    def _count(self, storage: torch.UntypedStorage) -> None:
        if not self._paused:
            super()._count(storage)

    def moved_to_host(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """These tensors went to host memory, which is the same place on a CPU.

        Parts of one storage stay that here; from a GPU each of them is copied into its own.
        """
        allocated: Counter[int] = Counter()
        for tensor in tensors:
            if tensor is not None:
                shard = local(tensor)
                size = self._allocated(shard.numel() * shard.element_size())
                allocated[shard.untyped_storage()._cdata] += size
        for key, size in allocated.items():
            if key in self._live:
                whole = self._live.pop(key)
                self._by_tag[self._tags.pop(key)] -= whole
                self._bytes -= whole
                self._keep_on_host(key, size if self._pins else whole)

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Within: storages that are made are for this."""
        with patch.object(self, "_tag", tag):
            yield

    def retag(self, tensors: Iterable[torch.Tensor | None], tag: str) -> None:
        """These tensors turned out to be for something else."""
        for tensor in tensors:
            key = None if tensor is None else local(tensor).untyped_storage()._cdata
            if key in self._live:
                self._by_tag[self._tags[key]] -= self._live[key]
                self._tags[key] = tag
                self._by_tag[tag] += self._live[key]

    def event(self, name: str) -> None:
        """Something begins or ends: a point of the timeline."""
        self.timeline.append(Moment(event=name, peak_bytes=self._since))
        self._since = self._bytes

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self._operation = func._opname
        if func is WAIT and isinstance(args[0], FakeTensor):  # whose own result would be a copy
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _changed(self, key: int, num_bytes: int) -> None:
        """A storage grew or shrank by so much."""
        self._by_tag[self._tags.setdefault(key, self._tag)] += num_bytes
        self._since = max(self._since, self._bytes)
        if self._bytes == self._peak and num_bytes > 0:
            self.peak.parts_bytes = dict(self._by_tag)
            self.peak.phase, self.peak.module = self.phase, self.module
            self.peak.operation = self._operation

    def _free(self, key: int) -> None:
        tag = self._tags.pop(key, None)
        if tag is not None:
            self._by_tag[tag] -= self._live.get(key, 0)
        super()._free(key)

    def _row(self, axis: str, kind: str, num_bytes: int) -> None:
        """As the base; sums of a few numbers (divided loss, norm) have an axis of their own."""
        in_loss = self.phase == "forward" and self._tag == LOSS and kind == "all_reduce"
        after = self.phase in (NORM, OPTIMIZER)
        super()._row("sums" if in_loss or after else axis, kind, num_bytes)

    def backward_done(self) -> None:
        """A backward pass of a micro-batch is over."""
        self.ends.append(self.rows())


@contextmanager
def observing(observer: Observer, parallel: Parallel) -> Iterator[None]:
    """Within: the observer knows what runs."""
    with ExitStack() as stack:
        at_end = parallel.place.stage == len(parallel.plan.stages) - 1
        for chunk in parallel.chunks:
            last = at_end and chunk is parallel.chunks[-1]
            _watch_layers(observer, chunk, LOSS if last else "output", stack)
        for owner, name, around in _patches(observer):
            stack.enter_context(patch.object(owner, name, around))
        stack.enter_context(observer)
        stack.enter_context(observer.tagged("embedding"))
        yield
        observer.event("end")


def _watch_layers(observer: Observer, chunk: Built, then: str, stack: ExitStack) -> None:
    """Note what runs of a chunk. `then`: what is made behind its last layer."""
    begin = chunk.root.register_forward_pre_hook(_begin(observer), prepend=True)
    stack.callback(begin.remove)
    names = chunk.layers
    for index, name in enumerate(names):
        layer: nn.Module = chunk.root.model.get_submodule(name)
        pre_hook = layer.register_forward_pre_hook(_enter(observer, name), prepend=True)
        behind = then if index == len(names) - 1 else ""
        post_hook = layer.register_forward_hook(_leave(observer, name, behind))
        stack.callback(pre_hook.remove)
        stack.callback(post_hook.remove)


def _begin(observer: Observer) -> Callable[..., None]:
    def begin(module: nn.Module, args: object) -> None:
        observer._tag = "embedding"

    return begin


def _enter(observer: Observer, name: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: object) -> None:
        observer.event(f"forward {name}")
        observer.module = name
        observer._tag = f"{LAYER}{name}"

    return enter


def _leave(observer: Observer, name: str, then: str) -> Callable[..., None]:
    def leave(module: nn.Module, args: object, output: object) -> None:
        observer.event(f"forward {name} done")
        observer.module = ""
        observer._tag = then or observer._tag

    return leave


def _patches(observer: Observer) -> Iterator[tuple[object, str, Callable[..., object]]]:
    """The functions of torch and of ours whose calls the observer must know of, each wrapped."""
    group = FSDPParamGroup
    # The first makes the buffer of the all-gather, the second the parameters copied out of it.
    for name in ("unshard", "wait_for_unshard"):
        yield group, name, _tagging(observer, getattr(group, name), "gathered parameters")
    yield group, "pre_backward", _noting_backward(observer, group.pre_backward)
    yield group, "post_backward", _reducing(observer, group.post_backward)
    yield Stage, "without_backward", _backward(observer, Stage.without_backward)
    yield Stage, "_receive", _tagging(observer, Stage._receive, "communication")
    yield AdamW, "step", _optimizing(observer, AdamW.step)
    # Whole backward passes call the first, split ones the second.
    for name in ("backward", "grad"):
        original = getattr(torch.autograd, name)
        yield torch.autograd, name, _backward(observer, original)
    yield Parallel, "gradients", _in_order(observer, Parallel.gradients)
    for name in ("propagate", "_propagate_tensor_meta", "_propagate_tensor_meta_non_cached"):
        original = getattr(ShardingPropagator, name)
        yield ShardingPropagator, name, _quietly(observer, original)


def _quietly(observer: Observer, original: Callable[..., Any]) -> Callable[..., object]:
    """DTensor asks for shapes with tensors of the size of the whole: no memory is theirs."""

    @wraps(original)
    def around(*args: object, **kwargs: object) -> object:
        with observer.paused():
            return original(*args, **kwargs)

    return around


def _tagging(observer: Observer, original: Callable[..., Any], tag: str) -> Callable[..., object]:
    @wraps(original)
    def around(*args: object, **kwargs: object) -> object:
        with observer.tagged(tag):
            return original(*args, **kwargs)

    return around


def _noting_backward(observer: Observer, original: Callable[..., Any]) -> Callable[..., object]:
    @wraps(original)
    def around(group: FSDPParamGroup, *args: object, **kwargs: object) -> object:
        observer.event(f"backward {group._module_fqn}")
        observer.module = str(group._module_fqn or "").removeprefix("model.")
        return original(group, *args, **kwargs)

    return around


def _reducing(observer: Observer, original: Callable[..., Any]) -> Callable[..., object]:
    @wraps(original)
    def around(group: FSDPParamGroup, *args: object) -> object:
        with observer.tagged("communication"):
            result = original(group, *args)
        # Under HSDP this waits for the all-reduce of the last micro-batch.
        observer.retag([group._partial_reduce_output], "gradients")
        host_gradients = [
            each.sharded_param.grad for each in group.fsdp_params if each.offload_to_cpu
        ]
        for each in group.fsdp_params:
            whole = getattr(each, "_unsharded_param", None)
            grads = (each.unsharded_accumulated_grad, each.sharded_param.grad)
            observer.retag((*grads, None if whole is None else whole.grad), "gradients")
        observer.moved_to_host(host_gradients)
        observer.event(f"reduced {group._module_fqn}")
        return result

    return around


def _optimizing(observer: Observer, original: Callable[..., Any]) -> Callable[..., object]:
    @wraps(original)
    def around(*args: object) -> object:
        observer.event("gradients done")
        observer.phase, observer.module = OPTIMIZER, ""
        with observer.tagged("working"):
            return original(*args)

    return around


def _backward(observer: Observer, original: Callable[..., Any]) -> Callable[..., object]:
    @wraps(original)
    def around(*args: object, **kwargs: object) -> object:
        before, observer.phase = observer.phase, "backward"
        try:
            with observer.tagged("working"):
                return original(*args, **kwargs)
        finally:
            observer.phase = before
            observer.backward_done()

    return around


def _in_order(observer: Observer, original: Callable[..., Any]) -> Callable[..., object]:
    @wraps(original)
    def around(*args: object) -> object:
        result = original(*args)
        observer.phase = NORM
        observer._tag = "working"
        return result

    return around
