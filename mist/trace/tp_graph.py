"""Regions of tensor parallelism from what a model does: pairs of matrices found in its operations.

Matrix R is row-parallel with column-parallel partners C_i when all that its input is made of,
walking back through the operations until products with a matrix, are outputs of the C_i and tables
without a gradient (rotary tables, masks): never what the layer itself was given (the residual
stream), nor the result of a norm over a partner's outputs, unless ranks can share its mean. Heads
are those of the attention operation on the way. Nothing is trusted: the runs that follow must
confirm it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Final

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from mist.trace.recording.recorded_run import Piece, RecordedRun
from mist.trace.repeated_blocks import find_layers
from mist.trace.tensor_parallel.tp_plan import PlannedRegions, plan_of_model, planned_regions
from mist.trace.tensor_parallel.tp_regions import Reader, regions_of
from mist.trace.tensor_parallel.tp_sharding import (
    Matrix,
    Region,
    Sharding,
    UnsupportedRules,
    matrices_in,
    matrices_of,
    sharding_of,
)

aten = torch.ops.aten

PRODUCTS: Final = frozenset({aten.mm.default, aten.addmm.default})
ATTENTION: Final = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._flash_attention_forward.default,
    }
)
SOFTMAX: Final = frozenset({aten._softmax.default, aten._safe_softmax.default})
NORMS: Final = frozenset(
    {
        aten.native_layer_norm.default, aten.native_group_norm.default,
        aten.native_batch_norm.default, torch.ops.mist.fused_rms_norm.default,
        aten.mean.dim, aten.linalg_vector_norm.default,  # of norms in single operations
    }
)  # fmt: skip
# Of these the one mean over the last dimension is that of the ranks' own means.
SHARED: Final = frozenset({torch.ops.mist.fused_rms_norm.default, aten.mean.dim})
# What leaves every number as it is, cast, scaled or dropped; views are known by themselves.
MOVES: Final = frozenset({aten._to_copy, aten.clone, aten.native_dropout, aten._unsafe_view})
NO_GRADIENT: Final = frozenset({"bool", "int32", "int64"})
TOKEN_DIMS: Final = 3  # [batch, sequence, hidden]
SCORE_DIMS: Final = 4
NO_TOKENS: Final = (
    "layers do not pass on [batch, sequence, hidden]: tensor parallelism is of no use; t = 1 only"
)
WHOLE_ATTENTION: Final = (
    "attention stays whole on every tensor-parallel rank: its heads are not divided"
)
NORMED: Final = " (a norm goes over all of them)"


def find_sharding(
    model: nn.Module, run: RecordedRun, left: frozenset[int] = frozenset()
) -> Sharding:
    """What tensor parallelism divides: by the plan of the model, and the rest by what `run` shows.

    Where a plan gathers what a matrix gives, nothing behind it is divided: the operations decide.
    `left`: modules that stay whole. Raises Unsupported, with the reason.
    """
    layers = [piece for piece in run.layers if piece.module is not None]
    if not layers:
        raise UnsupportedRules(
            "without a list of layers tensor parallelism is not planned; t = 1 only"
        )
    matrices = matrices_in(model)
    blocks = [_Block(piece, run, matrices) for piece in layers]
    sharding = _divided(model, run, blocks, left)
    attention = {id(m) for block in blocks for m in block.undivided_attention(sharding)}
    normed = any(block.normed_attention for block in blocks)
    notes = (f"{WHOLE_ATTENTION}{NORMED if normed else ''}",) if attention else ()
    # What lies outside the layers has all tokens as it is.
    whole = (sharding.whole & _inside_layers(model, run)) | attention
    return replace(sharding, whole=whole, notes=notes)


def _inside_layers(model: nn.Module, run: RecordedRun) -> set[int]:
    """All modules in layers, of which a run records one of each kind."""
    every = find_layers(model)
    recorded = [piece.module for piece in run.layers if piece.module is not None]
    layers = [*recorded, *(every.modules if every else ())]
    return {id(module) for layer in layers for module in layer.modules()}


def _divided(
    model: nn.Module, run: RecordedRun, blocks: Sequence["_Block"], left: frozenset[int]
) -> Sharding:
    """Regions and vocabulary, of the plan and of the operations. Raises Unsupported."""
    plan = plan_of_model(model)
    planned = planned_regions(model, plan, left) if plan is not None else PlannedRegions()
    if plan is None and not any(block.carries_tokens for block in blocks):
        raise UnsupportedRules(NO_TOKENS)
    taken = left | planned.taken
    # Convolutions in front of a transformer stay whole.
    inner = [block for block in blocks if block.carries_tokens]
    rest = [r for block in inner for r in block.regions() if not r.has_any(taken)]
    given = {key: heads for block in blocks for key, heads in block.given_heads.items()}
    regions = [_with_given(region, given) for region in (*planned.regions, *rest)]
    if not regions and planned.unknown:
        raise UnsupportedRules(f"{planned.unknown[0]}; t = 1 only")
    # A plan may divide the embedding alone, whose head then has all logits: both, or none.
    has_head = any(isinstance(table, nn.Linear) for table in planned.tables)
    tables = planned.tables if has_head else list(_vocabulary(model, run))
    whole = planned.whole_without(rest, [block.layer for block in blocks])
    return sharding_of(model, regions, tables, whole)


def _with_given(region: Region, given: Mapping[int, int]) -> Region:
    """A region with the heads that it is given, by the weights behind the attention."""
    heads = (given[id(m.weight)] for m in region.rowwise if id(m.weight) in given)
    return replace(region, given=frozenset(heads))


def _outputs(piece: Piece) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(piece.outputs) if isinstance(leaf, torch.Tensor)]


def _vocabulary(model: nn.Module, run: RecordedRun) -> Iterator[nn.Module]:
    """The last linear layer outside the layers that scores a table, and the first such table.

    Another table of that size, of positions, is no vocabulary; nor is one of kinds of tokens that
    has as many rows as there are classes. Vocabularies are looked up by what the model is given.
    """
    inside = _inside_layers(model, run)
    outside = [m for m in model.modules() if id(m) not in inside]
    every = [m for m in outside if isinstance(m, nn.Embedding)]
    given = _looked_up(run)
    tables = [m for m in every if id(m.weight) in given] or every
    sizes = [table.num_embeddings for table in tables]
    heads = [m for m in outside if isinstance(m, nn.Linear) and m.out_features in sizes]
    if heads:
        head = heads[-1]
        yield next(
            (t for t in tables if t.weight is head.weight), tables[sizes.index(head.out_features)]
        )
        yield head


def _looked_up(run: RecordedRun) -> set[int]:
    """Tables (by id of the weight) whose rows are chosen by an input of the model, as it is."""
    found = set()
    for node in run.embed.part.graph.nodes:
        if node.target is aten.embedding.default:
            key, index = node.args[0].meta.get("key"), _viewed(node.args[1])
            if index.op == "placeholder" and index.meta["key"] not in run.originals:
                found.add(id(run.originals.get(key)))
    return found


def _is_stream(node: fx.Node, hidden: int) -> bool:
    """Whether this is an activation as layers pass it on; a table of biases of heads is none.

    What a layer was given of another width is (embeddings of each layer): ranks that read a part of
    it would have a part of its gradient.
    """
    shape = node.meta["shape"]
    flat = len(shape) <= TOKEN_DIMS and bool(shape)
    return flat and (bool(node.meta.get("flows")) or int(shape[-1]) == hidden)


@dataclass(slots=True)
class _Ancestry:
    """What lies behind operands."""

    sources: dict[int, Matrix] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)
    residual: bool = False


class _Block:
    """The forward operations of one part, and the products with matrices among them."""

    def __init__(self, piece: Piece, run: RecordedRun, matrices: Mapping[int, Matrix]) -> None:
        assert piece.module is not None
        self.layer, self._run, self._matrices = piece.module, run, matrices
        outputs = _outputs(piece)
        self.carries_tokens = not outputs or outputs[0].dim() == TOKEN_DIMS
        self._hidden = outputs[0].shape[-1] if outputs else 0  # the width of the residual stream
        nodes = [n for n in piece.part.graph.nodes if n.meta.get("phase") == "forward"]
        self._nodes = nodes
        self._scores = {n: self._score_heads(n) for n in nodes if n.target in SOFTMAX}
        self._attention = [*filter(self._attends, nodes)]
        self._products = {n: m for n in nodes if (m := self._matrix(n)) is not None}
        self._written = defaultdict[fx.Node, list[fx.Node]](list)  # by what calls write into
        for node in nodes:
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
                self._written[_viewed(node)].append(node)
        self._between: dict[int, list[fx.Node]] = {}  # by weight: what lies behind its input
        # By weight: heads of the keys that an earlier layer made and its input attends to.
        self.given_heads: dict[int, int] = {}
        self._readers = [self._reader(node, matrix) for node, matrix in self._products.items()]

    def regions(self) -> Iterator[Region]:
        """What can be divided, confirmed by what else reads what enters."""
        for region in regions_of(self.layer, self._readers):
            if not self._leaves_elsewhere(region):
                yield region

    @property
    def normed_attention(self) -> bool:
        """Whether a norm goes over all heads of an attention."""
        return any(reader.head_dim and reader.normed for reader in self._readers)

    def undivided_attention(self, sharding: Sharding) -> Iterator[nn.Module]:
        """Modules with attention in which nothing is divided."""
        for node in self._attention:
            module = self._with_parameters(str(node.meta["module"]))
            if not any(id(parameter) in sharding.params for parameter in module.parameters()):
                yield module

    def _with_parameters(self, name: str) -> nn.Module:
        """The innermost module at or around this one that has parameters: a softmax has none."""
        while name and next(self.layer.get_submodule(name).parameters(), None) is None:
            name = name.rpartition(".")[0]
        return self.layer.get_submodule(name)

    def _matrix(self, node: fx.Node) -> Matrix | None:
        """The matrix of a product: its last operand that is no scalar."""
        if node.target not in PRODUCTS:
            return None
        operand = node.args[1] if node.target is aten.mm.default else node.args[2]
        # Transposes and casts have the parameter as their first argument.
        while isinstance(operand, fx.Node) and operand.op != "placeholder":
            operand = operand.args[0]
        key = operand.meta.get("key") if isinstance(operand, fx.Node) else None
        parameter = self._run.originals.get(key) if key is not None else None
        return self._matrices.get(id(parameter))

    def _behind(self, starts: Sequence[object]) -> _Ancestry:
        """Walk back from operands until products with a matrix."""
        ancestry = _Ancestry()
        waiting = [*starts]
        visited: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if not isinstance(node, fx.Node) or node in visited:
                continue
            visited.add(node)
            if node in self._products:
                matrix = self._products[node]
                ancestry.sources[id(matrix.weight)] = matrix
                continue
            if node.meta.get("dtype") in NO_GRADIENT:  # a choice of rows, a mask
                continue
            ancestry.nodes.append(node)
            ancestry.residual |= _begins(node) and _is_stream(node, self._hidden)
            waiting += [*node.all_input_nodes, *self._written.get(_viewed(node), ())]
        return ancestry

    def _reader(self, product: fx.Node, matrix: Matrix) -> Reader:
        """What the input of a matrix is made of."""
        behind = self._behind([product.args[0 if product.target is aten.mm.default else 1]])
        self._between[id(matrix.weight)] = behind.nodes
        attention = next((n for n in behind.nodes if n in self._attention), None)
        head_dim, alike = self._heads(attention, matrix) if attention else (None, True)
        over = [node for node in behind.nodes if _goes_over(node, behind.sources, head_dim)]
        norms = [self._shared_norm(node, behind.sources) for node in over]
        if attention is not None and (heads := self._given(attention)):
            self.given_heads[id(matrix.weight)] = heads
        return Reader(
            matrix=matrix,
            sources=behind.sources,
            residual=behind.residual,
            norms=[norm for norm in norms if norm is not None],
            normed=None in norms,
            linear=all(map(_only_scales, behind.nodes)),
            head_dim=head_dim,
            heads_alike=alike,
            pairs=self._pairs(attention) if attention else frozenset(),
        )

    def _shared_norm(self, node: fx.Node, sources: Mapping[int, Matrix]) -> nn.Module | None:
        """The module of a norm that ranks can share.

        Its parameters are as wide as its rows, of which there are as many as a source gives: more
        are those of heads.
        """
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        *rows, width = operand.meta["shape"]
        given = (n.meta["shape"][:-1] for n, m in self._products.items() if id(m.weight) in sources)
        module = self.layer.get_submodule(str(node.meta["module"]))
        fits = all(parameter.shape == (int(width),) for parameter in module.parameters())
        whole = any(prod(each) == prod(rows) for each in given)
        return module if node.target in SHARED and fits and whole else None

    def _attends(self, node: fx.Node) -> bool:
        return node.target in ATTENTION or self._scores.get(node) is not None

    def _score_heads(self, node: fx.Node) -> int | None:
        """The heads of the softmax of scores [b, heads, s, s]; None for another one, of routing."""
        module = self.layer.get_submodule(str(node.meta["module"]))
        if isinstance(module, nn.MultiheadAttention):  # [b * heads, s, s]
            return int(module.num_heads)
        shape = node.meta["shape"]
        return int(shape[1]) if len(shape) == SCORE_DIMS else None

    def _heads(self, attention: fx.Node, matrix: Matrix) -> tuple[int | None, bool]:
        """The size of a head of attention, and whether queries and values have the same."""
        shape = attention.meta["shape"]
        if heads := self._scores.get(attention):
            return (matrix.num_in // heads if matrix.num_in % heads == 0 else None), True
        query = attention.args[0]
        assert isinstance(query, fx.Node)
        return int(shape[-1]), shape[-1] == query.meta["shape"][-1]

    def _pairs(self, attention: fx.Node) -> frozenset[int]:
        """Weights of matrices that give both keys and values, and no queries."""
        if self._scores.get(attention):
            return frozenset()
        queries, keys, values = (self._behind([each]).sources for each in attention.args[:3])
        return frozenset((keys.keys() & values.keys()) - queries.keys())

    def _given(self, attention: fx.Node) -> int | None:
        """The heads of keys [b, heads, s, d] that no matrix of this layer made."""
        if attention in self._scores:
            return None
        behind = self._behind([attention.args[1]])
        shapes = (n.meta["shape"] for n in behind.nodes if n.meta.get("flows"))
        wide = [shape for shape in shapes if len(shape) == SCORE_DIMS]
        return int(wide[0][1]) if wide and not behind.sources else None

    def _leaves_elsewhere(self, region: Region) -> bool:
        """Whether a module that is entered as a whole adds what enters to what it gives.

        There its gradient would be whole, and not the sum of the ranks' parts.
        """
        matrices = {id(m.weight) for m in (*region.colwise, *region.rowwise)}
        around = [m for m in region.entered if not matrices_of(m)]
        inside = {n for m in around for n in self._names_in(m)}
        known = {node for key in self._inner(around) | matrices for node in self._between[key]}
        return any(
            str(node.meta["module"]) in inside
            and node not in known
            and node not in self._products
            and any(
                _begins(each) and _is_stream(each, self._hidden) for each in node.all_input_nodes
            )
            for node in self._nodes
        )

    def _inner(self, modules: Sequence[nn.Module]) -> set[int]:
        """The weights of matrices in modules."""
        return {key for module in modules for key in matrices_in(module)} & self._between.keys()

    def _names_in(self, module: nn.Module) -> Iterator[str]:
        inside = {id(inner) for inner in module.modules()}
        return (name for name, each in self.layer.named_modules() if id(each) in inside)


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of, or was written into; itself, if it is neither."""
    while isinstance(node.target, OpOverload) and (
        node.target.is_view or node.target._schema.is_mutable
    ):
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return node


def _begins(node: fx.Node) -> bool:
    """Whether a node is what the part was given, or a row of a table."""
    return bool(node.meta.get("flows")) or node.target is aten.embedding.default


def _goes_over(node: fx.Node, sources: Mapping[int, Matrix], head_dim: int | None) -> bool:
    """Whether a norm goes over outputs of a source, not over each head alone."""
    if node.target not in NORMS:
        return False
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    shape = operand.meta["shape"]
    widths = {matrix.num_out for matrix in sources.values()}
    flat = len(shape) <= TOKEN_DIMS and shape[-1] != head_dim
    return flat or int(shape[-1]) in widths


def _only_scales(node: fx.Node) -> bool:
    """Whether an operation moves, casts, scales or drops."""
    if node.op == "placeholder":
        return True
    assert isinstance(node.target, OpOverload)
    scales = node.target.overloadpacket is aten.mul and len(node.all_input_nodes) == 1
    return scales or node.target.is_view or node.target.overloadpacket in MOVES
