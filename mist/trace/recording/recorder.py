"""Records what one part of a model does: its operations as a torch.fx.Graph with costs.

A dispatch mode sees every aten call of the forward and the backward pass. Each becomes a node of
the part's graph with shapes, dtype, FLOPs, bytes, phase and module in `node.meta`, and, when it
does work on the device, one `Op` (one per matrix product). Autograd's sequence numbers tie a
backward call, and a saved tensor, to the forward call and module that caused it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import sympy
import torch
from sympy import Expr, Integer
from torch import fx, nn
from torch._ops import OpOverload
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mist.errors import TraceError
from mist.model.graph import Op, OpKind, Phase, SavedTensor, T, TensorLayout
from mist.trace.dispatch_call import Call, bind, key_of, tensors_in
from mist.trace.expressions import Size, Symbols
from mist.trace.operations.flops import work_of
from mist.trace.operations.fusion import Kernel
from mist.trace.operations.traffic import moves_bytes, read_bytes, traffic_class, written_bytes
from mist.trace.operations.work import Work
from mist.trace.recording.liveness import BackwardCall, Live
from mist.trace.recording.op_limit import OpLimit
from mist.trace.recording.recorded_part import Mixed, Origin, Part, SavedStorage
from mist.trace.tensor_parallel.tp_check import (
    JOINED,
    PRODUCTS,
    goes_over_tokens,
    is_partial,
    joins_shards,
    mixing,
    norm_sum,
)
from mist.trace.tensor_parallel.tp_sharding import RankModules
from mist.trace.tensor_parallel.tp_sums import NOT_LINEAR, PartialSums

KNOWN_NAMESPACES: Final = frozenset({"aten", "mist", "prims", "profiler"})
ACCUMULATE: Final = "torch::autograd::AccumulateGrad"


class Recorder(TorchDispatchMode):
    """Writes every call into the current part, if there is one."""

    def __init__(
        self,
        symbols: Symbols,
        states: Mapping[int, object],
        *,
        rank: RankModules,
        limit: OpLimit | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part: Part | None = None
        self.phase: Phase = "forward"
        self.parts: tuple[Part, ...] = ()
        self.modules: list[str] = []
        self.callers: list[nn.Module] = []
        self._limit = limit
        self._symbols = symbols
        self._states = states
        self._rank = rank
        self._tensors_shared: dict[int, SavedStorage] = {}
        self._kernel: Kernel | None = None
        self._sums = PartialSums()

    def on_call(self, kernel: Kernel | None) -> None:
        """The next call belongs to this kernel of a compiled graph (None: to none)."""
        self._kernel = kernel

    def widen(self, module: int) -> None:
        """This module has all tokens on each rank, too."""
        known = self._rank
        self._rank = replace(
            known, all_tokens=known.all_tokens | {module}, summed=known.summed | {module}
        )

    def new_part(
        self,
        name: str,
        shared: frozenset[int] = frozenset(),
        activation: torch.Tensor | None = None,
    ) -> Part:
        """An empty part with its input activation; storages in `shared` are not its own."""
        input_key = None if activation is None else key_of(activation)
        return Part(name, Live(self._symbols), shared, input=input_key)

    def bytes_of(self, tensor: torch.Tensor) -> Expr:
        """Bytes of the elements of a tensor."""
        return self._symbols.expr(tensor.numel() * tensor.element_size())

    @contextmanager
    def into(self, part: Part | None, phase: Phase = "forward") -> Iterator[None]:
        """Within: calls are recorded into `part` (None: nowhere)."""
        before = self.part, self.phase
        self.part, self.phase = part, phase
        try:
            yield
        finally:
            self.part, self.phase = before

    @contextmanager
    def backward_of(self, parts: Iterable[Part]) -> Iterator[None]:
        """Within: each backward call is recorded into the part whose forward call it answers."""
        self.parts = tuple(parts)
        with self.into(self.parts[0], "backward"):
            yield
        self.parts = ()

    def _turn(self) -> None:
        """Turn to the part of the autograd node that runs, if it is known."""
        node: Node | None = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        self.part = next((part for part in self.parts if number in part.origins), self.part)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.parts:
            self._turn()
        if self.part is not None and func.namespace != "prim" and not _accumulates():
            self._record(self.part, Call(func, bind(func, args, kwargs), out))
        return out

    def _record(self, part: Part, call: Call) -> None:
        if call.func.namespace not in KNOWN_NAMESPACES:
            raise TraceError(
                f"operation {call.func} is not one of torch's own, so Mist does not know its cost. "
                "Use the same layer written with torch operations to plan."
            )
        name = str(call.func.overloadpacket)
        origin = self._origin(part, name)
        mixes: list[str] = []
        layout = TensorLayout.REPLICATED
        if self.phase == "backward":
            layout = self._leave(part, call, origin)
        else:
            self._read(part, call)
            self._await(part, call, origin)
            mixes = self._check(part, call, origin)
            self._gather(part, call)
            self._follow(part, call, origin)
            if part.forward_only or part.works_forward:
                self._leave(part, call, origin)
            else:
                divided = any(map(self._is_divided, tensors_in(tuple(call.arguments.values()))))
                part.live.called_forward(self._results(part, call), divided=divided)
        layout = TensorLayout.GATHERED if origin.whole else layout
        ops = self._ops(call, origin, layout) if self._runs(call) else []
        part.ops.extend(ops)
        if self._limit is not None and self.phase == "forward":
            self._limit.check(part.ops)
        node = self._add_node(part, call, ops, origin.module)
        part.mixed += (Mixed(origin.module, words, node) for words in mixes)

    def _origin(self, part: Part, name: str) -> Origin:
        """The operation a call belongs to; in the forward pass remembered for the backward."""
        if self.phase == "forward":
            # The call has run, so the counter stands at the number of the next one.
            sequence = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
            module = self.modules[-1] if self.modules else ""
            # A composite operation dispatches several calls under one number: the first one names
            # it.
            part.last = Origin(name, module, self._needs_all_tokens(), self._entrance(part))
            part.origins.setdefault(sequence, part.last)
            return part.last
        node: Node | None = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() in part.origins:
            part.last = part.origins[node._sequence_nr()]
        return replace(part.last, op=name)

    def _needs_all_tokens(self) -> bool:
        inside = self.part is not None and self.part.whole
        return inside or any(id(module) in self._rank.all_tokens for module in self.callers)

    def _entrance(self, part: Part) -> int | None:
        """What the module that runs was given as it entered a region: its gradient is one sum."""
        known = part.entered.keys() & self._rank.entrances
        inner = next((id(m) for m in reversed(self.callers) if id(m) in known), None)
        return None if inner is None else part.entered[inner][-1].key

    def _read(self, part: Part, call: Call) -> None:
        """Note the parameters that a forward call reads, and its results in a compiled graph."""
        keys = (key_of(t) for t in tensors_in(tuple(call.arguments.values())))
        part.used.update((key, None) for key in keys if key in self._states)
        if part.compiled and moves_bytes(
            call.func, call.out
        ):  # a graph has one node for all its calls: the maker is known here only
            maker = str(call.func.overloadpacket), len(part.ops) + 1
            part.makers.update((key_of(t), maker) for t in tensors_in(call.out))

    def _await(self, part: Part, call: Call, origin: Origin) -> None:
        """Note a call that reads a parameter and an activation."""
        inputs = list(tensors_in(tuple(call.arguments.values())))
        parameters = {key for key in map(key_of, inputs) if key in self._states}
        result = part.awaited.read(inputs, parameters, list(tensors_in(call.out)))
        if result is None:
            return
        size = self.bytes_of(result)
        whole = origin.whole or any(map(self._is_divided, inputs))
        undivided = TensorLayout.GATHERED if whole else TensorLayout.REPLICATED
        part.awaited.gradients.append(
            SavedTensor(
                bytes=size,
                shape=self._symbols.shape(result),
                dtype=dtype_of(result),
                op=origin.op,
                module=origin.module,
                layout=TensorLayout.SHARDED if T in size.free_symbols else undivided,
            )
        )

    def _check(self, part: Part, call: Call, origin: Origin) -> list[str]:
        """What ranks with a share, of a dimension or of the tokens, could not run."""
        place = f"{origin.op} in {origin.module}"
        if joins_shards(call, self._symbols.shape):
            part.refusals.append(f"{place} {JOINED}")
        if self._rank.columns and part.on_tokens and goes_over_tokens(call, self._symbols.shape):
            part.on_tokens(origin.module)
        if (means := self._norm_sum(part, call)) is not None:
            inputs = tensors_in([*call.arguments.values()])
            flows = part.compiled or any(each.requires_grad for each in inputs)
            part.norm_sums.append((self.bytes_of(means), flows))
            return []
        return [f"{place}: {reason}" for reason in mixing(call, self._symbols.shape)]

    def _norm_sum(self, part: Part, call: Call) -> torch.Tensor | None:
        """The means that ranks add up in a norm over what they divide, if this call makes them."""
        # A compiled graph hides its modules.
        inside = part.compiled or any(id(module) in self._rank.norms for module in self.callers)
        known = inside and bool(self._rank.norms)
        return norm_sum(call, self._symbols.shape) if known else None

    def _leave(self, part: Part, call: Call, origin: Origin) -> TensorLayout:
        """Note the storages that a call leaves alive, and their form on a rank.

        Returns the form of what it works on. A compiled graph, which is one node of autograd, does
        not tell what is gathered for which call.
        """
        inputs = list(tensors_in(tuple(call.arguments.values())))
        node: Node | None = torch._C._current_autograd_node()
        step = BackwardCall(
            inputs=tuple(map(key_of, inputs)),
            node=None if node is None else node._sequence_nr(),
            divided=origin.whole or any(map(self._is_divided, (*inputs, *tensors_in(call.out)))),
            adds=call.func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_),
            entrance=origin.entrance,
        )
        layout = part.live.called(step, self._results(part, call))
        return TensorLayout.REPLICATED if part.compiled else layout

    def _results(self, part: Part, call: Call) -> list[torch.Tensor]:
        """The results of a call that are the part's own and stay in memory."""
        if self._kernel is not None and self._kernel.hidden:
            return []
        return [
            tensor
            for tensor in tensors_in(call.out)
            if key_of(tensor) not in self._states and key_of(tensor) not in part.shared
        ]

    def _is_divided(self, tensor: torch.Tensor) -> bool:
        """Whether tensor parallelism divides a tensor."""
        return T in self._symbols.expr(tensor.untyped_storage().nbytes()).free_symbols

    def _follow(self, part: Part, call: Call, origin: Origin) -> None:
        """Follow sums over the ranks through a call, in a module that is one region."""
        if not any(id(module) in self._rank.summed for module in self.callers):
            return
        if not self._sums.read(call):
            part.refusals.append(f"{origin.op} in {origin.module} {NOT_LINEAR}")
        if is_partial(call, self._symbols.shape):
            self._sums.begin(call)

    def module_done(self, module: nn.Module, output: object) -> None:
        """A module has run; `callers` are those around it."""
        around = any(id(outer) in self._rank.summed for outer in self.callers)
        if id(module) not in self._rank.summed or around or self.phase != "forward":
            return
        if not self._sums.end(output) and self.part is not None:
            kind = type(module).__name__
            self.part.refusals.append(f"{kind} does not give the sum over the ranks first")

    def _runs(self, call: Call) -> bool:
        """Whether a call is a kernel on the device: no view, and not fused into another."""
        fused = self._kernel is not None and not self._kernel.charged
        return not fused and moves_bytes(call.func, call.out)

    def _gather(self, part: Part, call: Call) -> None:
        """The input of a column-parallel product is gathered; a compiled graph has no hooks."""
        if call.func.overloadpacket in PRODUCTS:
            (operand, _), (matrix, _) = PRODUCTS[call.func.overloadpacket]
            if id(self._states.get(key_of(call.tensor(matrix)))) in self._rank.columns:
                part.gathered.add(key_of(call.tensor(operand)))

    def _ops(self, call: Call, origin: Origin, layout: TensorLayout) -> list[Op]:
        """The operations of a call; `layout` of what no matrix divides."""
        works = work_of(call) or [Work(OpKind.MEMORY, (), 0)]
        made = (self._op(call, origin.module, work, len(works)) for work in works)
        return [
            replace(op, layout=layout) if op.layout != TensorLayout.SHARDED else op for op in made
        ]

    def _op(self, call: Call, module: str, work: Work, parts: int) -> Op:
        """One of the `parts` products of a call, with an equal part of its bytes."""
        flop, dims = self._flop(work), [self._symbols.expr(size) for size in work.dims]
        out = next(tensors_in(call.out))
        if work.groups > 1:
            dims[0] *= work.groups
            dims[work.split] /= work.groups
        kernel = self._kernel
        sizes = (read_bytes(call), written_bytes(call))
        if kernel is not None:
            sizes = (kernel.read_bytes, kernel.written_bytes)
        read, written = (self._symbols.expr(size) / parts for size in sizes)
        sharded = any(T in size.free_symbols for size in (flop, read, written))
        return Op(
            name=str(call.func.overloadpacket),
            kind=work.kind,
            phase=self.phase,
            module=module,
            dims=tuple(dims),
            causal=call.arguments.get("is_causal") is True,
            traffic=traffic_class(call.func) if kernel is None else kernel.traffic,
            layout=TensorLayout.SHARDED if sharded else TensorLayout.REPLICATED,
            flop=flop,
            shape=self._symbols.shape(out),
            dtype=dtype_of(out),
            read_bytes=read,
            written_bytes=written,
        )

    def _flop(self, work: Work) -> Expr:
        flop = self._symbols.expr(work.flop)
        return flop if work.log2_of == 2 else flop * sympy.log(self._symbols.expr(work.log2_of), 2)

    def _add_node(self, part: Part, call: Call, ops: list[Op], module: str) -> fx.Node:
        def node_of(value: object) -> object:
            if isinstance(value, torch.Tensor):
                if value not in part.nodes:
                    key = key_of(value)
                    flows = value.requires_grad and key not in self._states
                    part.nodes[value] = part.graph.placeholder("input")
                    shape = self._symbols.shape(value)
                    part.nodes[value].meta.update(key=key, flows=flows, shape=shape)
                return part.nodes[value]
            return str(value) if isinstance(value, torch.SymInt) else value

        arguments = tree_map(node_of, tuple(call.arguments.values()))
        node = part.graph.call_function(call.func, arguments)
        outs = list(tensors_in(call.out))
        for tensor in outs:
            part.nodes[tensor] = node
        node.meta.update(
            shape=self._symbols.shape(outs[0]) if outs else (),
            dtype=dtype_of(outs[0]) if outs else "",
            flop=sum((op.flop for op in ops), Integer(0)),
            bytes=sum((op.traffic_bytes for op in ops), Integer(0)),
            phase=self.phase,
            module=module,
        )
        return node

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hook on saving a tensor for backward: count its storage once."""
        part, key = self.part, key_of(tensor)
        if part is None or self.phase == "backward":
            return tensor
        # Inputs are saved before a kernel runs. A graph saves all behind its last call: where it is
        # checkpointed within, only what made a saved tensor runs again.
        _, needed = part.makers.get(key, ("", 0)) if part.compiled else ("", len(part.ops))
        part.num_recomputed_ops = max(part.num_recomputed_ops, needed)
        if key in self._states:
            return tensor
        if self._needs_all_tokens():
            part.gathered.add(key)
        storages = self._tensors_shared if key in part.shared else part.storages
        if key not in storages:
            storages[key] = self._storage(tensor, key)
            if key not in part.shared:
                part.live.save(tensor)
        return tensor

    def _storage(self, tensor: torch.Tensor, key: int) -> SavedStorage:
        sequence = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        size: Size = tensor.untyped_storage().nbytes()
        shape = self._symbols.shape(tensor)
        return SavedStorage(self._symbols.expr(size), shape, dtype_of(tensor), sequence, key)

    @property
    def shared(self) -> dict[int, SavedStorage]:
        """Storages that layers saved but do not own: rotary tables, masks."""
        return self._tensors_shared


@contextmanager
def recording(recorder: Recorder, names: Mapping[torch.nn.Module, str]) -> Iterator[None]:
    """Within: the recorder sees calls, saved tensors and the module they come from."""

    def enter(module: torch.nn.Module, args: object) -> None:
        # A function that is called as a module (of a library of kernels) has no name of its own.
        around = recorder.modules[-1] if recorder.modules else ""
        recorder.modules.append(names.get(module, around))
        recorder.callers.append(module)

    def leave(module: torch.nn.Module, args: object, output: object) -> None:
        recorder.modules.pop()
        recorder.callers.pop()
        recorder.module_done(module, output)

    hooks = (
        register_module_forward_pre_hook(enter),
        # Also behind an exception, or the stack of modules would stay off.
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        with saved_tensors_hooks(recorder.pack, lambda tensor: tensor), recorder:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def dtype_of(tensor: torch.Tensor) -> str:
    """A dtype's plain name: "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def _accumulates() -> bool:
    """Whether autograd is adding a gradient into its parameter: the optimizer's side."""
    node: Node | None = torch._C._current_autograd_node()
    return node is not None and node.name() == ACCUMULATE
