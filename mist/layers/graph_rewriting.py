"""Activations and gated products that are written out in the forward of a small module.

torch.fx draws the forward with its children as leaves; in the drawing, a product of an activation
and another tensor becomes one gated product, and an activation that is called as a function becomes
ours; `F.dropout` keeps a mask. What can run differently another time is not rewritten: a forward
with more than one argument or with branches on values, and one that reads `training` otherwise.
"""

import operator
from collections.abc import Callable, Mapping
from inspect import signature
from types import MethodType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mist.layers.activation_functions import ACTIVATIONS, ActivationRung, activate, gains, gated
from mist.layers.masks import Masks, dropout
from mist.layers.norms import RUNG_WORDS
from mist.layers.recognition import takes_one_tensor

FUNCTIONS: Final[Mapping[object, str]] = {
    F.silu: "silu",
    F.gelu: "gelu",
    torch._C._nn.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
}
PRODUCTS: Final = frozenset({operator.mul, torch.mul})


class _Leaves(fx.Tracer):
    """Draws one module; its children are leaves, whatever they are."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def rewrite(
    module: nn.Module, activations: Mapping[str, str], rung: ActivationRung, masks: Masks
) -> tuple[str, ...]:
    """Put our activations and gated products into a module's forward, in place.

    `activations`: names of activations by name of child. Returns what was changed, in words.
    """
    graph = _drawn(module, masks)
    if graph is None:
        return ()
    words = [
        word
        for node in list(graph.nodes)
        if (word := _changed(graph, node, activations, rung, masks))
    ]
    if words:
        forward = type(fx.GraphModule(module, graph)).forward
        module.forward = MethodType(forward, module)
    return tuple(words)


def _changed(
    graph: fx.Graph,
    node: fx.Node,
    activations: Mapping[str, str],
    rung: ActivationRung,
    masks: Masks,
) -> str | None:
    """Put ours in the place of one node, if it has one; what that is, in words."""
    if node.target is _dropped:
        return f"dropout, keeps a {masks} an element"
    name, users = _name_of(node, activations), list(node.users)
    if name is None:
        return None
    if len(users) == 1 and _is_product(users[0]):
        _gate(graph, node, users[0], name, rung)
        # A product of two does not tell both: it has no form from its result.
        words = RUNG_WORDS["fused" if rung == "output" else rung]
        return f"{name} times a second matrix, {words}"
    if node.op == "call_function" and gains(name, rung):
        _activate(graph, node, name, rung, masks)
        return f"{name}, {RUNG_WORDS[rung]}"
    return None


def _drawn(module: nn.Module, masks: Masks) -> fx.Graph | None:
    """The graph of a forward that is the same in every call, or None."""
    if not takes_one_tensor(module):
        return None
    mode = module.training
    try:
        graphs = []
        for training in (True, False):
            module.training = training
            graphs.append(_with_dropout(_Leaves().trace(module), masks))
    except Exception:  # branches on values, other libraries: any error that proxies can raise
        return None
    finally:
        module.training = mode
    first, second = (graph.python_code("self").src for graph in graphs)
    return graphs[0] if first == second else None


def _with_dropout(graph: fx.Graph, masks: Masks) -> fx.Graph:
    """The graph in which dropout asks the module whether it trains, and keeps a mask."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.dropout:
            continue
        call = signature(F.dropout).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        x, p, training, inplace = call.args
        if inplace or not isinstance(training, bool):
            continue
        with graph.inserting_before(node):
            asks = graph.get_attr("training")
            node.replace_all_uses_with(graph.call_function(_dropped, (x, p, asks, masks)))
        graph.erase_node(node)
    return graph


def _name_of(node: fx.Node, activations: Mapping[str, str]) -> str | None:
    """The activation that a node is, or None."""
    if node.op == "call_module":
        return activations.get(str(node.target))
    name = FUNCTIONS.get(node.target) if node.op == "call_function" else None
    options = dict(node.kwargs)
    if name == "gelu" and options.pop("approximate", "none") == "tanh":
        name = "gelu-tanh"
    options.pop("inplace", None)
    # Any other argument is one that we do not know the meaning of.
    return None if options or len(node.args) != 1 else name


def _is_product(node: fx.Node) -> bool:
    tensors = len(node.args) == 2 and all(isinstance(each, fx.Node) for each in node.args)
    return node.op == "call_function" and node.target in PRODUCTS and tensors


def _gate(graph: fx.Graph, node: fx.Node, product: fx.Node, name: str, rung: str) -> None:
    """One step for activation and product, where the product was."""
    first, second = product.args
    other = second if first is node else first
    with graph.inserting_before(product):
        product.replace_all_uses_with(
            graph.call_function(_gated, (node.args[0], other, name, rung))
        )
    graph.erase_node(product)
    graph.erase_node(node)  # the product was all that read it


def _activate(graph: fx.Graph, node: fx.Node, name: str, rung: str, masks: Masks) -> None:
    with graph.inserting_before(node):
        ours: Callable[..., Any] = _activated
        node.replace_all_uses_with(graph.call_function(ours, (node.args[0], name, rung, masks)))
    graph.erase_node(node)


def _gated(gate: Tensor, up: Tensor, name: str, rung: ActivationRung) -> Tensor:
    # A gate that is broadcast has a gradient that is summed: a product of two steps, as it was.
    if gate.shape != up.shape:
        return ACTIVATIONS[name].run(gate) * up
    return gated(gate, up, name, rung)


def _activated(x: Tensor, name: str, rung: ActivationRung, masks: Masks) -> Tensor:
    return activate(x, name, rung, masks)


def _dropped(x: Tensor, p: float, training: bool, masks: Masks) -> Tensor:
    return dropout(x, p, masks) if training and p > 0 else x
