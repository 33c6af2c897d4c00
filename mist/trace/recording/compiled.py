"""A layer as torch.compile runs it: traced ahead of time, cut in two where the least is kept.

AOTAutograd traces forward and backward as one graph, decomposed as Inductor decomposes it, and the
min-cut partitioner decides what the forward graph keeps and what the backward graph computes again
(the sizes that decide are the hints of the symbols). Both graphs then run call by call in the place
of the layer, so that what they do is recorded as it is of a layer that is not compiled.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._functorch._aot_autograd import graph_compile
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mist.trace.models.fake_tensors import tables_of
from mist.trace.operations.fusion import Kernel, kernels_of
from mist.trace.operations.kernels import KNOWN_AS

OnCall = Callable[[Kernel | None], None]


class _Runs(fx.Interpreter):
    """Runs a graph call by call.

    `on_call` gets, before each call, what that does to memory: None where it runs by itself.
    """

    def __init__(self, graph: fx.GraphModule, on_call: OnCall) -> None:
        super().__init__(graph)
        # Kernels first: which operations fuse is decided by the names of the stand-ins.
        self._kernels, self._on_call = kernels_of(graph.graph), on_call
        for node in graph.graph.nodes:  # what is recorded is the operation that one stands for
            node.target = KNOWN_AS.get(node.target, node.target)

    def run_node(self, n: fx.Node) -> object:
        """One call."""
        self._on_call(self._kernels.get(n))
        return super().run_node(n)


def compiled(
    layer: nn.Module,
    forward: Callable[..., object],
    inputs: tuple[tuple[object, ...], dict[str, object]],
    *,
    sizes: torch.Tensor,
    on_call: OnCall,
) -> Callable[[], object]:
    """Compile a layer's forward for these (args, kwargs); what is returned runs it.

    `sizes`: a tensor in whose shape every symbol stands alone, by which the graph knows it.
    `on_call`: see `_Runs`.
    """
    leaves, input_spec = tree_flatten(inputs)
    positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tables = [table for module in layer.modules() for table in tables_of(module)]
    entries = [(t, n) for t in tables for n, value in t.items() if isinstance(value, torch.Tensor)]
    outputs: list[TreeSpec] = []

    def pure(*tensors: torch.Tensor) -> list[object]:
        values = list(leaves)
        for index, tensor in zip(positions, tensors, strict=False):
            values[index] = tensor
        with _holding(entries, tensors[len(positions) : -1]):
            own_args, own_kwargs = tree_unflatten(values, input_spec)
            results, spec = tree_flatten(forward(*own_args, **own_kwargs))
        outputs[:] = [spec]
        return results

    def graph_runs(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        boxed: Callable[..., object] = make_boxed_func(_Runs(gm, on_call).run)
        return boxed

    function = aot_function(
        pure,
        fw_compiler=graph_runs,
        bw_compiler=graph_runs,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )

    def run() -> object:
        # AOTAutograd takes a tensor that is no argument for a constant: parameters and buffers are
        # arguments.
        tensors = [leaves[index] for index in positions] + [table[name] for table, name in entries]
        return tree_unflatten(list(function(*tensors, sizes)), outputs[0])

    # Numbers made of symbols would become tensors, of symbols that only Dynamo announces.
    no_tensors = patch.object(graph_compile, "_apply_tensorify_python_scalars", lambda graph: None)
    with no_tensors, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Raw SymFloat", UserWarning)
        run()  # compiles; the backward graph, too
    return run


@contextmanager
def _holding(
    entries: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Within: tables of modules hold these tensors."""
    before = [table[name] for table, name in entries]
    for (table, name), tensor in zip(entries, tensors, strict=True):
        table[name] = tensor
    try:
        yield
    finally:
        for (table, name), tensor in zip(entries, before, strict=True):
            table[name] = tensor
