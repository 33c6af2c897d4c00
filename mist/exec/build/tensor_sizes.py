"""A module's own forward on a rank's part: the numbers in its calls are those of the part.

The trace found which calls those are (`mist.trace.tensor_parallel.local_sizes`). They are counted
anew in each forward, as the trace counted them: those of modules within it are not its own.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mist.trace.operations.sized_calls import (
    Args,
    Kwargs,
    OperandPart,
    SizedCalls,
    SizeRule,
    operands_of,
    sized_call,
    with_operands,
)


class _LocalCalls(SizedCalls):
    """Changes the calls of one module's forward by their rules."""

    def __init__(self, module: nn.Module, rules: Mapping[int, SizeRule], mesh: DeviceMesh) -> None:
        super().__init__()
        self._module, self._rules = module, rules
        self._rank, self._num_ranks = mesh.get_local_rank(), mesh.size()

    def mend(
        self, module: nn.Module, number: int, name: str, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """The call as this rank makes it."""
        rule = self._rules.get(number) if module is self._module else None
        if rule is None:
            return args, kwargs
        if rule.operands:
            tensors = operands_of(name, args, kwargs)
            parts = {i: self._part(tensors[i], part) for i, part in rule.operands.items()}
            return with_operands(args, kwargs, parts)
        call = sized_call(name, args, kwargs)
        assert call is not None  # the trace saw its numbers
        numbers = [
            rule.numbers[i].at(size, self._num_ranks) if i in rule.numbers else size
            for i, size in enumerate(call.numbers)
        ]
        return call.rebuild(numbers), {}

    def _part(self, tensor: torch.Tensor, part: OperandPart) -> torch.Tensor:
        size = (part.block or tensor.shape[part.dim]) // self._num_ranks
        return part.of(tensor, self._rank * size, size)


def run_with_local_sizes(
    module: nn.Module, rules: Mapping[int, SizeRule], mesh: DeviceMesh
) -> None:
    """Have the module's forward run with the sizes that the ranks of `mesh` have, in place."""
    calls = _LocalCalls(module, rules, mesh)
    for inner in module.modules():
        if inner is not module:
            inner.register_forward_pre_hook(calls.enter, prepend=True)
            inner.register_forward_hook(calls.leave, always_call=True)
    module.forward = partial(_forward, module, module.forward, calls)


def _forward(
    module: nn.Module,
    forward: Callable[..., object],
    calls: _LocalCalls,
    *args: object,
    **kwargs: object,
) -> object:
    calls.enter(module, args)
    try:
        with calls:
            return forward(*args, **kwargs)
    finally:
        calls.leave(module, args, None)
