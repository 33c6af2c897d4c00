"""Finds the scans in a model's code that a package of kernels has, and runs them as its kernels.

A model that is written for such a package has the scan in a reference form, too, as a function of
the same arguments. Known by the names of these, whatever it is called and wherever the model has it
from: a global of the modules that its classes lie in, or an attribute of a module of it.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import nn

from mist.trace.expressions import hint_of
from mist.trace.operations.model_functions import functions_of
from mist.trace.operations.scans import (
    ChannelDeltaRule,
    GatedDeltaRule,
    SelectiveScan,
    StateSpaceDuality,
    UnitVectors,
)

OnCall = Callable[..., Any]
Arguments = Mapping[str, Any]

# What references and kernels call the same argument.
NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"query": "q", "key": "k", "value": "v", "hidden_states": "x", "u": "x", "delta": "dt"}
)
# Arguments with which a scan carries a state from call to call, or several sequences in one.
STATEFUL: Final = (
    "initial_state", "initial_states", "output_final_state", "return_final_states",
    "return_last_state", "cu_seqlens", "seq_idx",
)  # fmt: skip


def _delta_rule(of: Arguments) -> torch.Tensor:
    """A decay [b, s, h] of each head, or [b, s, h, k] of each channel."""
    q, k = of["q"], of["k"]
    if of.get("use_qk_l2norm_in_kernel"):
        q, k = _apply(UnitVectors, q), _apply(UnitVectors, k)
    rule = GatedDeltaRule if of["g"].dim() == of["beta"].dim() else ChannelDeltaRule
    return _apply(rule, q, k, of["v"], of["g"], of["beta"])


def _delta_result(of: Arguments) -> tuple[torch.Tensor, None]:
    return _delta_rule(of), None


def _tokens_first(of: Arguments) -> bool:
    """Whether tokens come before heads, as in the kernels: there are more of them."""
    tokens, heads = of["q"].shape[1:3]
    return hint_of(tokens) >= hint_of(heads)


def _duality(of: Arguments) -> torch.Tensor:
    inputs = (of[name] for name in ("x", "dt", "A", "B", "C", "chunk_size", "D", "dt_bias"))
    return _apply(StateSpaceDuality, *inputs)


def _selective(of: Arguments) -> torch.Tensor:
    inputs = (of[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "delta_bias"))
    return _apply(SelectiveScan, *inputs)


def _apply(function: type[torch.autograd.Function], *inputs: object) -> torch.Tensor:
    result: torch.Tensor = function.apply(*inputs)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownScan:
    """A scan that has kernels: the arguments it is known by, and what runs in its place."""

    parameters: frozenset[str]
    run: Callable[[Arguments], object]
    takes: Callable[[Arguments], bool] = lambda of: True


KNOWN_SCANS: Final = (
    KnownScan(
        parameters=frozenset({"q", "k", "v", "g", "beta"}), run=_delta_result, takes=_tokens_first
    ),
    KnownScan(
        parameters=frozenset({"x", "dt", "A", "B", "C", "chunk_size", "D", "dt_bias"}),
        run=_duality,
    ),
    KnownScan(
        parameters=frozenset({"x", "dt", "A", "B", "C", "D", "z", "delta_bias"}), run=_selective
    ),
)


@contextmanager
def scans_as_kernels(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within: the known scans of these modules run as kernels."""
    with ExitStack() as stack:
        for table, name, function in functions_of(modules):
            scan = _known(function)
            if scan is not None:
                stack.enter_context(patch.dict(table, {name: _stand_in(function, scan)}))
        yield


def _known(function: OnCall) -> KnownScan | None:
    names = {NAMES.get(name, name) for name in inspect.signature(function).parameters}
    return next((scan for scan in KNOWN_SCANS if scan.parameters <= names), None)


def _stand_in(function: OnCall, scan: KnownScan) -> OnCall:
    """The scan as kernels; the function itself where a state goes in or out."""
    signature = inspect.signature(function)

    @wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        of = {NAMES.get(name, name): value for name, value in bound.arguments.items()}
        given = of | of.get("kwargs", {})
        states = [given.get(name) for name in STATEFUL]
        if any(state is not None and state is not False for state in states):
            return function(*args, **kwargs)
        return scan.run(of) if scan.takes(of) else function(*args, **kwargs)

    return run
