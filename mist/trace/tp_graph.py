"""Regions of tensor parallelism from what a model does: pairs of matrices found in its operations.

Matrix R is row-parallel with column-parallel partners C_i when all that its input is made of,
walking back through the operations until products with a matrix, are outputs of the C_i and tables
without a gradient (rotary tables, masks): never what the layer itself was given (the residual
stream), nor the result of a norm over a partner's outputs. Heads are those of the attention
operation on the way. Nothing is trusted: the runs that follow must confirm it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from mist.trace.recording.recorded_run import Piece, RecordedRun
from mist.trace.repeated_blocks import find_layers
from mist.trace.tensor_parallel.tp_plan import plan_of_model, sharding_by_plan
from mist.trace.tensor_parallel.tp_sharding import (
    Matrix,
    Region,
    Sharding,
    UnsupportedRules,
    matrix_of,
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
    }
)  # fmt: skip
TOKEN_DIMS: Final = 3  # [batch, sequence, hidden]
SCORE_DIMS: Final = 4
NO_TOKENS: Final = (
    "layers do not pass on [batch, sequence, hidden]: tensor parallelism is of no use; t = 1 only"
)
WHOLE_ATTENTION: Final = (
    "attention stays whole on every tensor-parallel rank: its heads are not divided"
)


def find_sharding(
    model: nn.Module, run: RecordedRun, left: frozenset[int] = frozenset()
) -> Sharding:
    """What tensor parallelism divides: by the model's plan, else by its operations in `run`.

    A plan that gathers the outputs of every matrix divides no activation: it is passed over.
    `left`: modules that stay whole. Raises Unsupported, with the reason.
    """
    layers = [piece for piece in run.layers if piece.module is not None]
    if not layers:
        raise UnsupportedRules(
            "without a list of layers tensor parallelism is not planned; t = 1 only"
        )
    matrices = {id(m.weight): m for m in map(matrix_of, model.modules()) if m is not None}
    blocks = [_Block(piece, run, matrices) for piece in layers]
    if (plan := plan_of_model(model)) is not None:
        sharding = sharding_by_plan(model, plan, left)
    elif all(map(_carries_tokens, layers)):
        regions = [region for block in blocks for region in block.regions()]
        regions = [region for region in regions if not region.has_any(left)]
        sharding = sharding_of(model, regions, list(_vocabulary(model, run)))
    else:
        raise UnsupportedRules(NO_TOKENS)
    attention = {id(m) for block in blocks for m in block.undivided_attention(sharding)}
    notes = (WHOLE_ATTENTION,) if attention else ()
    # What lies outside the layers has all tokens as it is.
    every = find_layers(model)
    inside = {id(m) for layer in (every.modules if every else ()) for m in layer.modules()}
    return replace(sharding, whole=(sharding.whole & inside) | attention, notes=notes)


def _carries_tokens(piece: Piece) -> bool:
    outputs = _outputs(piece)
    return not outputs or outputs[0].dim() == TOKEN_DIMS


def _outputs(piece: Piece) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(piece.outputs) if isinstance(leaf, torch.Tensor)]


def _vocabulary(model: nn.Module, run: RecordedRun) -> Iterator[nn.Module]:
    """The last linear layer outside the layers that scores a table, and the first such table.

    Another table of that size, of positions, is no vocabulary.
    """
    inside = {id(m) for piece in run.layers if piece.module for m in piece.module.modules()}
    outside = [m for m in model.modules() if id(m) not in inside]
    tables = [m for m in outside if isinstance(m, nn.Embedding)]
    sizes = [table.num_embeddings for table in tables]
    heads = [m for m in outside if isinstance(m, nn.Linear) and m.out_features in sizes]
    if heads:
        head = heads[-1]
        yield next(
            (t for t in tables if t.weight is head.weight), tables[sizes.index(head.out_features)]
        )
        yield head


def _is_scores(node: fx.Node) -> bool:
    """Whether this is the softmax of attention scores [b, heads, s, s], not one of routing."""
    return node.target in SOFTMAX and len(node.meta["shape"]) == SCORE_DIMS


def _is_stream(node: fx.Node, hidden: int) -> bool:
    """Whether this is an activation as layers pass it on; a table of biases of heads is none."""
    shape = node.meta["shape"]
    return len(shape) <= TOKEN_DIMS and bool(shape) and int(shape[-1]) == hidden


@dataclass(slots=True)
class _Ancestry:
    """What lies behind the input of a matrix."""

    partners: dict[int, Matrix] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)
    residual: bool = False


class _Block:
    """The forward operations of one part, and the products with matrices among them."""

    def __init__(self, piece: Piece, run: RecordedRun, matrices: Mapping[int, Matrix]) -> None:
        assert piece.module is not None
        self._layer, self._run, self._matrices = piece.module, run, matrices
        outputs = _outputs(piece)
        self._hidden = outputs[0].shape[-1] if outputs else 0  # the width of the residual stream
        nodes = [n for n in piece.part.graph.nodes if n.meta.get("phase") == "forward"]
        self._attention = [n for n in nodes if n.target in ATTENTION or _is_scores(n)]
        self._products = {n: m for n in nodes if (m := self._matrix(n)) is not None}

    def regions(self) -> Iterator[Region]:
        """Pairs in the order of execution; a matrix is in one of them."""
        used: set[int] = set()
        for node, matrix in self._products.items():
            ancestry = self._behind(node)
            partners = list(ancestry.partners.values())
            # A weight that two regions read (tied layers) goes to the first of them.
            names = {id(m.weight) for m in (matrix, *partners)}
            if not partners or ancestry.residual or names & used or self._normed(ancestry):
                continue
            used |= names
            yield Region(
                owners=list(self._owners([matrix, *partners])),
                head_dim=self._head_dim(ancestry, matrix),
                colwise=partners,
                rowwise=[matrix],
            )

    def undivided_attention(self, sharding: Sharding) -> Iterator[nn.Module]:
        """Modules with attention in which nothing is divided."""
        for node in self._attention:
            module = self._layer.get_submodule(str(node.meta["module"]))
            if not any(id(parameter) in sharding.params for parameter in module.parameters()):
                yield module

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

    def _behind(self, product: fx.Node) -> _Ancestry:
        """Walk back from the input of a product."""
        ancestry = _Ancestry()
        waiting = [product.args[0] if product.target is aten.mm.default else product.args[1]]
        visited: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if not isinstance(node, fx.Node) or node in visited:
                continue
            visited.add(node)
            if node in self._products:
                matrix = self._products[node]
                ancestry.partners[id(matrix.weight)] = matrix
                continue
            ancestry.nodes.append(node)
            begins = bool(node.meta.get("flows")) or node.target is aten.embedding.default
            ancestry.residual |= begins and _is_stream(node, self._hidden)
            waiting += node.all_input_nodes
        return ancestry

    def _normed(self, ancestry: _Ancestry) -> bool:
        """Whether a norm goes over all outputs of a partner."""
        widths = {matrix.num_out for matrix in ancestry.partners.values()}
        norms = (node for node in ancestry.nodes if node.target in NORMS)
        return any(int(node.meta["shape"][-1]) in widths for node in norms)

    def _head_dim(self, ancestry: _Ancestry, matrix: Matrix) -> int | None:
        """Of the attention operation on the way; of scores [b, heads, s, s] by their number."""
        for node in ancestry.nodes:
            if node.target in ATTENTION:
                return int(node.meta["shape"][-1])
            if _is_scores(node):
                heads = int(node.meta["shape"][1])
                return matrix.num_in // heads if matrix.num_in % heads == 0 else None
        return None

    def _owners(self, matrices: Sequence[Matrix]) -> Iterator[object]:
        """The modules around the matrices, within the layer.

        Not a configuration that they share: what else reads it has no share.
        """
        inside = {id(matrix.module) for matrix in matrices}
        for module in self._layer.modules():
            if any(id(inner) in inside for inner in module.modules()):
                yield module
