"""Sizes of a symbolic run as plain sympy expressions in B, S, T.

A run creates torch symbols with a hint; each has a meaning (`b` means B, a shard of 8 heads means
8 / T). Torch's own functions (FloorDiv, CeilToInt, ...) become sympy's, so that nothing downstream
needs torch to read an expression.
"""

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Final

import sympy
import torch
from sympy import Basic, Expr
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mist.errors import TraceError
from mist.model.graph import T

Size = int | torch.SymInt

MAX_SIZE: Final = 2**40

# Sizes are not negative, so truncation is floor.
PLAIN: Final[Mapping[str, Callable[..., Basic]]] = MappingProxyType(
    {
        "FloorDiv": lambda a, b: sympy.floor(a / b),
        "CleanDiv": lambda a, b: a / b,
        "IntTrueDiv": lambda a, b: a / b,
        "FloatTrueDiv": lambda a, b: a / b,
        "CeilToInt": sympy.ceiling,
        "FloorToInt": sympy.floor,
        "TruncToInt": sympy.floor,
        "ToFloat": lambda a: a,
        "Identity": lambda a: a,
        "Mod": sympy.Mod,
        "PythonMod": sympy.Mod,
        "Max": sympy.Max,
        "Min": sympy.Min,
        "PowByNatural": sympy.Pow,
    }
)


class Symbols:
    """The symbolic sizes of one run: torch's ShapeEnv and what its symbols mean."""

    def __init__(self) -> None:
        # Sizes that are equal by chance (a hint and a number of heads) must not become one symbol.
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        # Its entries cost more than they save: few operations of a layer repeat their shapes.
        self.mode.cache_enabled = False
        self._meanings: dict[Basic, Expr] = {}
        self._known: dict[Basic, Expr] = {}

    def create(self, name: str, *, hint: int, meaning: Expr) -> torch.SymInt:
        """A new size >= 2 that stands for `meaning`; `hint` decides branches on shapes."""
        source = ConstantSource(name)
        symbol = self.env.create_symbol(
            hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        # With an upper bound torch knows that x[0:] is all of x, and skips it as for numbers.
        self.env.constrain_symbol_range(symbol, compiler_min=2, compiler_max=MAX_SIZE)
        self._meanings[symbol] = meaning
        size = self.env.create_symintnode(symbol, hint=hint, source=source)
        if not isinstance(size, torch.SymInt):
            raise TypeError(f"torch specialised {name} to {size}")
        return size

    def expr(self, size: Size) -> Expr:
        """A size in B, S, T. Raises TraceError when it depends on data."""
        if isinstance(size, int):
            return sympy.Integer(size)
        return self._plain(size.node.expr)

    def shape(self, tensor: torch.Tensor) -> tuple[Expr, ...]:
        """The shape of a tensor in B, S, T."""
        return tuple(self.expr(size) for size in tensor.shape)

    def _plain(self, raw: Basic) -> Expr:
        if raw not in self._known:
            self._known[raw] = sympy.expand(self._translate(raw))
        return self._known[raw]

    def _translate(self, raw: Basic) -> Expr:
        if raw.is_Symbol:
            if raw in self._meanings:
                return self._meanings[raw]
            raise TraceError(
                f"a size depends on the values of tensors (torch names it {raw}),"
                " not only on batch and sequence length. Replace what selects by value"
                " (nonzero, boolean indexing, ...) by one whose output shape is fixed. Experts that"
                " select their tokens are recognised where their module, or one around it, has the"
                " attributes num_experts and top_k."
            )
        if not raw.args:
            return raw
        args = [self._translate(arg) for arg in raw.args]
        return PLAIN.get(type(raw).__name__, raw.func)(*args)

    def domain(self) -> tuple[Basic, ...]:
        """The relations in B, S, T on which the traced path relies, without those always true."""
        relations = (self._translate(guard.expr) for guard in self.env.guards)
        # Guards that hold for all positive sizes have become plain True by now.
        inequalities = {r for r in relations if isinstance(r, sympy.core.relational.Relational)}
        inequalities |= {sympy.Eq(size, value) for size, value in self.fixed().items()}
        return tuple(sorted((r for r in inequalities if not r.free_symbols & {T}), key=str))

    def fixed(self) -> dict[Expr, Expr]:
        """Symbols that the model forced to one value: meaning -> value."""
        return {
            self._meanings[symbol]: value
            for symbol, value in self.env.replacements.items()
            if symbol in self._meanings and not self._is_meant(symbol, value)
        }

    def _is_meant(self, symbol: Basic, value: Basic) -> bool:
        """Whether a symbol means what it was found to be: rows of all experts are all rows."""
        known = value.free_symbols <= self._meanings.keys()
        return known and bool(self._plain(value) == sympy.expand(self._meanings[symbol]))


def hint_of(size: Size) -> int:
    """A size as a number: of a symbol its hint. What is decided by it adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def num_bytes(tensor: torch.Tensor) -> Size:
    """Bytes that reading the whole tensor touches: an expanded dimension (stride 0) counts once."""
    strides: tuple[Size, ...] = tensor.stride()
    # A symbolic stride is no 0; comparing it would add a guard.
    sizes = (
        size
        for size, stride in zip(tensor.shape, strides, strict=True)
        if not (isinstance(stride, int) and stride == 0)
    )
    return prod(sizes, start=tensor.element_size())
