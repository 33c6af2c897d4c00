"""A layer as torch.compile runs it: traced ahead of time, cut in two where the least is kept.

AOTAutograd traces forward and backward as one graph, decomposed as Inductor decomposes it, and the
min-cut partitioner decides what the forward graph keeps and what the backward graph computes again
(the sizes that decide are the hints of the symbols). Both graphs then run call by call in the place
of the layer, so that what they do is recorded as it is of a layer that is not compiled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import fx, nn
from torch._functorch._aot_autograd import graph_compile
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mist.trace.fake import tables_of
from mist.trace.fusion import Kernel, kernels_of
from mist.trace.kernels import KNOWN_AS

OnCall = Callable[[Kernel | None], None]


class _Runs(fx.Interpreter):
    """Runs a graph call by call; `on_call` is told before each what it does to memory."""

    def __init__(self, graph: fx.GraphModule, on_call: OnCall) -> None:
        super().__init__(graph)  # type: ignore[no-untyped-call]
        self._kernels, self._on_call = kernels_of(graph.graph), on_call

    def run_node(self, n: fx.Node) -> object:
        """One call."""
        self._on_call(self._kernels.get(n))
        return super().run_node(n)  # type: ignore[no-untyped-call]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> object:
        """The operation that an opaque one stands for is what is recorded."""
        target = KNOWN_AS.get(target, target)
        return super().call_function(target, args, kwargs)  # type: ignore[no-untyped-call]


def compiled(
    layer: nn.Module,
    forward: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    sizes: torch.Tensor,
    on_call: OnCall,
) -> Callable[[], object]:
    """Compile a layer's forward for these inputs; what is returned runs it.

    `sizes`: a tensor in whose shape every symbol stands alone, by which the graph knows it.
    `on_call` is told of each call of the graphs what it does to memory, None for one by itself.
    """
    leaves, inputs = tree_flatten((tuple(args), dict(kwargs)))
    given = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    held = [(t, name) for m in layer.modules() for t in tables_of(m) for name in _tensor_names(t)]
    outputs: list[TreeSpec] = []

    def pure(*tensors: torch.Tensor) -> list[object]:
        values = list(leaves)
        for index, tensor in zip(given, tensors, strict=False):
            values[index] = tensor
        with _holding(held, tensors[len(given) : -1]):
            own_args, own_kwargs = tree_unflatten(values, inputs)
            found, spec = tree_flatten(forward(*own_args, **own_kwargs))
        outputs[:] = [spec]
        return found

    def graph_runs(graph: fx.GraphModule, _: Sequence[object]) -> Callable[..., object]:
        runs = _Runs(graph, on_call)
        return make_boxed_func(runs.run)  # type: ignore[no-untyped-call,no-any-return]

    function = aot_function(
        pure,
        fw_compiler=graph_runs,
        bw_compiler=graph_runs,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )

    def run() -> object:
        tensors = [leaves[index] for index in given] + [table[name] for table, name in held]
        return tree_unflatten(list(function(*tensors, sizes)), outputs[0])

    # Numbers made of symbols would become tensors, of symbols that only Dynamo announces.
    with patch.object(graph_compile, "_apply_tensorify_python_scalars", lambda graph: None):
        run()  # compiles; the backward graph, too
    return run


def _tensor_names(table: Mapping[str, object]) -> list[str]:
    return [name for name, value in table.items() if isinstance(value, torch.Tensor)]


@contextmanager
def _holding(
    held: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Within: tables of modules hold these tensors."""
    before = [table[name] for table, name in held]
    for (table, name), tensor in zip(held, tensors, strict=True):
        table[name] = tensor
    try:
        yield
    finally:
        for (table, name), tensor in zip(held, before, strict=True):
            table[name] = tensor
