"""What is recorded of one part of a model: a layer, or what comes before or after the layers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from sympy import Expr
from torch import fx
from torch._ops import OpOverload
from torch.utils.weak import WeakTensorKeyDictionary

from mist.model.graph import Op, SavedTensor, T, TensorLayout
from mist.trace.dispatch_call import key_of
from mist.trace.recording.graph_edges import activation
from mist.trace.recording.liveness import Live
from mist.trace.recording.split_backward import Awaited


@dataclass(slots=True)
class SavedStorage:
    """A saved storage, before its origin and layout are known."""

    bytes: Expr
    shape: tuple[Expr, ...]
    dtype: str
    sequence: int
    key: int


@dataclass(frozen=True, slots=True)
class Origin:
    """What a call belongs to: operation, module, and whether that module needs all tokens.

    `entrance`: where the module's input entered what tensor parallelism divides, if it did.
    """

    op: str = ""
    module: str = ""
    whole: bool = False
    entrance: int | None = None
    compiled: bool = False
    makers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mixed:
    """A module with an operation that a shard cannot run, with the reason, and its result."""

    module: str
    words: str
    node: fx.Node


@dataclass(frozen=True, slots=True)
class Entered:
    """A tensor that enters a tensor-parallel region: which, and the bytes of its elements."""

    key: int
    bytes: Expr


@dataclass(slots=True)
class Part:
    """What is recorded of one part: a layer, or what comes before or after the layers.

    `whole`: whether all of it counts as in need of all tokens. `compiled`: whether it runs as a
    compiled graph; then `makers` are the operations that made its storages, by name, and how many
    had run by then. `entered`: modules whose input enters a tensor-parallel region, with what
    entered in their calls; `exposed`: those whose input no module around them was given; `flows`:
    those, and ends of a region, through which a gradient goes back. `forward_only`: nothing has a
    gradient: memory of a forward pass; `works_forward`: its forward pass may hold most, too.
    `mixed`: operations that a shard cannot run; `norm_sums`: bytes of each mean that ranks add up,
    and whether it has a gradient; `results`: of what it gave; `on_tokens`: is given the name of
    each module that goes over the tokens of whole tensors; `handed`: saved storages that later
    layers hold, too; `refusals`: why `mist apply` cannot divide it. `input`: the storage of its
    input activation.
    """

    name: str
    live: Live
    shared: frozenset[int] = frozenset()
    whole: bool = False
    compiled: bool = False
    makers: dict[int, tuple[str, int]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    num_recomputed_ops: int = 0
    storages: dict[int, SavedStorage] = field(default_factory=dict)
    handed: dict[int, SavedStorage] = field(default_factory=dict)
    used: dict[int, None] = field(default_factory=dict)
    gathered: set[int] = field(default_factory=set)
    entered: dict[int, list[Entered]] = field(default_factory=dict)
    exposed: set[int] = field(default_factory=set)
    flows: set[int] = field(default_factory=set)
    forward_only: bool = False
    works_forward: bool = False
    mixed: list[Mixed] = field(default_factory=list)
    norm_sums: list[tuple[Expr, bool]] = field(default_factory=list)
    results: frozenset[fx.Node] = frozenset()
    on_tokens: Callable[[str], None] | None = None
    refusals: list[str] = field(default_factory=list)
    awaited: Awaited = field(default_factory=Awaited)
    input: int | None = None
    last: Origin = Origin()
    origins: dict[int, Origin] = field(default_factory=dict)
    graph: fx.Graph = field(default_factory=fx.Graph)
    # Weak keys: the graph must not prolong the lives that are recorded.
    nodes: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def identity(self, tensor: torch.Tensor) -> int:
        """A number that no other tensor here has; the storages of freed ones are used again."""
        node = self.nodes.get(tensor)
        return key_of(tensor) if node is None or node.op == "placeholder" else -id(node)

    def saved(self) -> tuple[SavedTensor, ...]:
        """The saved storages, with what saved them."""
        return tuple(self._saved(storage) for storage in self.storages.values())

    @property
    def keeps_input(self) -> bool:
        """Whether its input is among what it saved."""
        return self.input in self.storages

    def mixes(self) -> Iterator[Mixed]:
        """Operations that a shard cannot run and whose result is read, or given by the part.

        As weights of attention, which torch's module averages over the heads for who wants them.
        """
        return (each for each in self.mixed if self._is_read(each.node))

    def _is_read(self, node: fx.Node) -> bool:
        if node in self.results:
            return True
        users = (user for user in node.users if user.meta["phase"] == "forward")
        return any(not _is_view(user) or self._is_read(user) for user in users)

    def leave(self, outputs: Sequence[torch.Tensor]) -> None:
        """Of like layers the next one keeps, as its input, a result that this one keeps, too."""
        hidden = activation(outputs)
        if hidden is None or not self.keeps_input:
            return
        key = key_of(hidden)
        if key in self.storages and key != self.input:
            del self.storages[key]
            self.live.release(key)

    def hand_on(self, keys: Iterable[tuple[int, int]]) -> None:
        """Results that later layers read as storages `keys[1]`: saved once for all of them."""
        for key, handed in keys:
            if key != self.input and key in self.storages:
                self.handed[handed] = self.storages.pop(key)

    def early(self) -> tuple[SavedTensor, ...]:
        """Those that the last operation with a parameter, and the ones before it, saved."""
        stored, last = self.storages.values(), self.awaited.sequence
        return tuple(self._saved(storage) for storage in stored if storage.sequence <= last)

    def _saved(self, storage: SavedStorage) -> SavedTensor:
        origin = self.origins.get(storage.sequence, Origin())
        undivided = storage.key in self.gathered or not storage.bytes.free_symbols
        whole = TensorLayout.GATHERED if undivided else TensorLayout.REPLICATED
        return SavedTensor(
            bytes=storage.bytes,
            shape=storage.shape,
            dtype=storage.dtype,
            op=self.makers[storage.key][0] if storage.key in self.makers else origin.op,
            module=origin.module,
            layout=TensorLayout.SHARDED if T in storage.bytes.free_symbols else whole,
        )


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.is_view
