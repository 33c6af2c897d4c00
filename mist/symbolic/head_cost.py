"""Cost of the two ends of a model: the embedding, and the head with the loss.

The loss is the model's own, traced with the head, or the runtime's, whose bytes and traffic per
logit stand in its profile.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

import sympy
from sympy import Expr

from mist.model.graph import Block, OpKind, T
from mist.model.summary import Traffic
from mist.plans.workload import HeadMode, Precision
from mist.platform.runtime import Loss
from mist.symbolic import symbols as sym
from mist.symbolic.block import (
    BlockCost,
    collective_cost,
    device_cost,
    forward_ops,
)
from mist.symbolic.cost_setting import CostSetting


def embed_cost(block: Block, setting: CostSetting) -> BlockCost:
    """Cost of the embedding."""
    return _end_cost(block, setting, device_cost(block, setting))


def any_head_cost(heads: Mapping[HeadMode, Block], setting: CostSetting) -> BlockCost:
    """Cost of the head in the mode that `symbols.HEAD` says, of those that are known."""
    costs = {mode: head_cost(block, setting) for mode, block in heads.items()}
    plain = costs[HeadMode.NONE]
    # A mode that was not traced is refused before it is priced (`mist.pareto.strategies.priced`).
    each = [costs.get(mode, plain) for mode in HeadMode]
    values = {item.name: [getattr(cost, item.name) for cost in each] for item in fields(BlockCost)}
    return BlockCost(**{name: sym.by_head(of_modes) for name, of_modes in values.items()})


def head_cost(block: Block, setting: CostSetting) -> BlockCost:
    """Cost of the head, with the loss of the runtime if it has its own."""
    setting = replace(setting, whole=setting.runtime.kernels.whole_tail)
    loss, logits = setting.runtime.loss, _logits(block)
    if loss is None or logits is None:
        device = device_cost(block, setting)
        divided = setting.runtime.transients.divided_loss_bytes_per_logit
        if divided is not None and logits is not None and _divides_loss(block):
            more = sympy.Piecewise((divided.value * logits, T > 1), (0, True))
            device["transient_bytes"] += more
            device["transient_with_grads_bytes"] += more
            device["transient_adding_bytes"] += more
            device["made_bytes"] += more
            if block.forward_bytes:
                device["forward_bytes"] += more
        return _end_cost(block, setting, device)
    device = device_cost(_without_loss(block), setting)
    return _end_cost(block, setting, _with_loss(device, loss, logits, setting.numerics.compute))


def _end_cost(block: Block, setting: CostSetting, device: dict[str, Expr]) -> BlockCost:
    return BlockCost(
        **device,
        **collective_cost(block, setting, recomputed_exits=0),
        boundary_bytes=sympy.Integer(0),
    )


def _logits(block: Block) -> Expr | None:
    """How many logits a rank has: the result of the last product forward, if there is one."""
    products = [op for op in forward_ops(block) if op.kind == OpKind.GEMM]
    return sympy.prod(products[-1].dims[:3]) if products else None


def _divides_loss(block: Block) -> bool:
    """Whether tensor-parallel ranks hold parts of the logits."""
    return any(param.sharded for param in block.params)


def _without_loss(block: Block) -> Block:
    """A head without what the model does outside its modules: the loss."""
    return replace(
        block,
        ops=tuple(op for op in block.ops if op.module or op.kind != OpKind.MEMORY),
        saved=tuple(tensor for tensor in block.saved if tensor.module),
        saved_single=tuple(tensor for tensor in block.saved_single if tensor.module),
        transient_bytes=(),
        transient_with_grads_bytes=(),
        transient_adding_bytes=(),
        made_bytes=(),
        forward_bytes=(),
    )


def _with_loss(
    device: dict[str, Expr], loss: Loss, logits: Expr, precision: Precision
) -> dict[str, Expr]:
    """A head's cost and its loss: a third of the bytes moved is the forward's.

    Where the loss is at its peak no gradient of a parameter exists. Behind it what it kept is gone,
    and the head turns the gradient of its logits into that of its matrix.
    """
    held = logits if loss.vocabulary_parallel else sympy.expand(logits * T)
    moved_s = sym.MEMORY[Traffic.SOFTMAX](held * loss.moved_bytes_per_logit.value, 1)
    kept = held * loss.kept_bytes_per_logit.value
    more = held * loss.peak_bytes_per_logit.value - kept
    behind = precision.num_bytes * (logits + device["params"]) - kept
    return device | {
        "forward_s": device["forward_s"] + moved_s / 3,
        "backward_s": device["backward_s"] + 2 * moved_s / 3,
        "saved_bytes": device["saved_bytes"] + kept,
        "transient_bytes": more,
        "transient_with_grads_bytes": sym.larger(more, behind),
        "transient_adding_bytes": sym.larger(more, behind),
    }
