"""What the groups of FSDP and a backward pass hold for a while, beside states and activations."""

import sympy
from sympy import Expr

from mist.plans.workload import Precision
from mist.symbolic import symbols as sym
from mist.symbolic.block_sums import Row, of_blocks, params_of, term, total, worst
from mist.symbolic.pipeline_memory import UNMADE_RATIO, SplitBackward, either, last

_ONE = sympy.Integer(1)


def activations_bytes(rows: list[Row]) -> Expr:
    """What is kept of the micro-batches in flight, and of those that wait for W."""
    layers = [row for row in rows if row[0].isdigit()]
    embed, head = (term(f"{end}_none_kept_bytes") for end in ("embed", "head"))
    kept = (sym.IN_FLIGHT + sym.LAYERS_MORE) * total(layers, "kept_bytes")
    kept += sym.IN_FLIGHT * sym.CHUNKS * term("shared_bytes")
    kept += sym.FIRST * (sym.IN_FLIGHT + sym.EMBED_MORE) * embed + sym.LAST * sym.HEAD_HELD * head
    of_head = sym.LAST * sym.CHUNKS * (term("head_early_bytes") + term("head_awaited_bytes"))
    return kept + sym.WAITING * (of_blocks(layers, "awaited_bytes") + of_head)


def held_by_groups(rows: list[Row], precision: Precision) -> tuple[dict[str, Expr], Expr, Expr]:
    """What FSDP and a backward pass hold for a while: as it begins, ends, last; what is gathered.

    The last result are gradients that the states lack, as the optimizer steps.

    Groups of parameters: P of a layer, R of both ends (the root); gradients are of those of them
    that are trained. Under ZeRO-3 the root is gathered at all instants, so is a layer that has a
    backward pass, and the next one beside the one that runs. A layer that runs makes gradients in
    compute precision, beside what the reduction before holds in fp32 (of the micro-batch before:
    that of `_reduced_last`; other chunks of the rank hold theirs, too); all of them are copied to
    fp32 when it has run. Gradients of the head wait for those of the embedding. While a layer runs
    backward nothing of the head is kept; at the first layer nothing of others, when the root is
    reduced and when the optimizer streams its states nothing at all.

    Where all forward passes come first there is no gradient when the first backward pass begins;
    all the others hold a micro-batch less, and begin later than it ends. The last one drops the
    gathered parameters of each layer that has run.
    """
    layers = [row for row in rows if row[0].isdigit()]
    ends = [row for row in rows if not row[0].isdigit()]
    root, trained = params_of(ends), params_of(ends, "trainable_params")
    layer = worst(layers, "{x}_params")
    buffer = term("buffer_bytes_per_param") * _reduced_last(layers, trained)
    early = (1 - sym.FORWARD_FIRST) * buffer
    first = _running(layers, early, precision) + worst(layers, "{x}_{level}_kept_bytes")
    reduced = _copied(precision) * trained - _next_layer(layers)
    again = sym.FORWARD_FIRST * (1 - _lone()) * _begins(layers, buffer, precision)
    left = _left("layer_")
    dropped = sym.FORWARD_FIRST * _lone() * term("unsharded_bytes_per_param")
    done = sym.larger(reduced, _streamed(rows), again) + _left("") * trained
    shrinks = left * worst(layers, "{x}_trainable_params") - dropped * layer
    of_layers = left * of_blocks(layers, "trainable_params")
    of_layers -= dropped * of_blocks(layers, "params")
    end = sym.larger(first - shrinks, done) + of_layers / sym.CHUNKS
    end -= total(layers, "kept_bytes") / sym.CHUNKS + total(ends, "kept_bytes")
    end -= term("shared_bytes")
    begin = _begins(layers, early, precision)
    split = _split(rows, begin)
    others = (sym.CHUNKS - 1) * term("buffer_bytes_per_param")
    others *= worst(layers, "{x}_trainable_params")
    amid = (1 - sym.FORWARD_FIRST) * (1 - sym.ONE_ROUND) * others
    begin = either(begin + amid, split.begin())
    unmade = UNMADE_RATIO * gradients_bytes(rows)
    instants = {
        "begin_bytes": begin,
        "end_bytes": either(end + amid, split.end()),
        "last_bytes": _last(rows, begin, unmade - activations_bytes(rows), first + others),
    }
    gathered = term("whole_bytes_per_param") * root + _next_layer(layers)
    grads = of_layers + _left("") * trained + unmade - sym.FORWARD_FIRST * gradients_bytes(rows)
    return instants, gathered, grads


def _last(rows: list[Row], begin: Expr, made: Expr, chunks: Expr) -> Expr:
    """As the last backward pass of a step runs, when all gradients are `made`."""
    layers = [row for row in rows if row[0].isdigit()]
    fp32 = term("fp32_bytes_per_param") * worst(layers, "{x}_trainable_params")
    chunks += (1 - sym.FORWARD_FIRST) * (1 - term("reduces")) * fp32
    reduced = 2 * fp32 - term("unsharded_bytes_per_param") * params_of(rows)
    return last(begin, chunks=made + chunks, reduced=made + reduced)


def _reduced_last(layers: list[Row], of_root: Expr) -> Expr:
    """Parameters of the group that FSDP2 reduces last: behind the root, layers without gradient.

    Of their inputs, that is; only one of them is trained.
    """
    here = of_blocks(layers, "without_gradient")
    last = (
        count * term(f"{x}_without_gradient") * term(f"{x}_trainable_params")
        for x, _, count in layers
    )
    return sympy.Add(*last) + (1 - sym.smaller(1, here)) * of_root


def _split(rows: list[Row], begin: Expr) -> SplitBackward:
    """What a split backward pass holds."""
    layers = [row for row in rows if row[0].isdigit()]
    compute = term("compute_bytes_per_param")
    return SplitBackward(
        loss=sym.LAST * term("head_made_bytes"),
        layer=worst(layers, "{x}_made_bytes"),
        awaited=of_blocks(layers, "awaited_bytes"),
        head_awaited=sym.LAST * term("head_awaited_bytes"),
        largest=compute * worst(layers, "{x}_largest_params"),
        layers=compute * of_blocks(layers, "trainable_params"),
        one=compute * worst(layers, "{x}_trainable_params"),
        head=compute * sym.LAST * term("head_trainable_params"),
        other=begin,
        streamed=_streamed(rows),
    )


def _next_layer(layers: list[Row]) -> Expr:
    """Bytes of the layer that is gathered for its backward pass, or ahead of it."""
    return term("whole_bytes_per_param") * worst(layers, "{x}_back_params")


def _begins(layers: list[Row], buffer: Expr, precision: Precision) -> Expr:
    """What a backward pass holds as it begins: in the loss, then in the first layer it runs."""
    apart = _apart(precision)
    loss = _made_in([("head", "none", sym.LAST)], apart) + sym.LAST * buffer
    no_head = sym.LAST * term("head_none_kept_bytes")
    return sym.larger(0, loss, _running(layers, buffer, precision) - no_head)


def _running(layers: list[Row], buffer: Expr, precision: Precision) -> Expr:
    """What the worst layer that runs backward holds, then its gradients as they are copied."""
    params, apart = worst(layers, "{x}_trainable_params"), _apart(precision)
    fp32 = term("fp32_bytes_per_param")
    reduces = sym.larger(term("buffer_bytes_per_param"), _lone() * fp32)
    runs = _made_in(layers, apart) + sym.larger(reduces * params, buffer)
    wait = apart * term("compute_bytes_per_param") * sym.LAST * term("head_trainable_params")
    gathered = term("whole_bytes_per_param") * worst(layers, "{x}_params")
    return sym.larger(runs, _copied(precision) * params) + wait + gathered


def _made_in(rows: list[Row], apart: Expr) -> Expr:
    """What the backward pass of the worst block makes, gradients included.

    Where they are added to those of the micro-batch before at once, only those just made.
    """
    running = worst(rows, "{x}_{level}_running_bytes")
    if apart == 1:
        return running
    return apart * running + (1 - apart) * worst(rows, "{x}_{level}_adding_bytes")


def _apart(precision: Precision) -> Expr:
    """1 where a layer's gradients are not added at once to those of the micro-batch before.

    They are where both are fp32 and no reduction takes them.
    """
    if precision is not Precision.FP32:
        return _ONE
    return sym.larger(term("reduces"), sym.FORWARD_FIRST)


def _copied(precision: Precision) -> Expr:
    """Bytes per parameter of gradients and of the fp32 copy that a reduction or a sum begins with.

    Later micro-batches add to that copy where nothing is reduced.
    """
    copies = sym.larger(term("reduces"), sym.FORWARD_FIRST) * term("fp32_bytes_per_param")
    return _apart(precision) * term("compute_bytes_per_param") + copies


def _left(which: str) -> Expr:
    """Bytes per parameter of gradients that the first backward pass leaves on the device."""
    left, amid = (term(f"{which}{name}_bytes_per_param") for name in ("left", "grads"))
    return sym.FORWARD_FIRST * (_lone() * left + (1 - _lone()) * amid)


def _streamed(rows: list[Row]) -> Expr:
    """What the optimizer has on its way: buckets, of one parameter at least; no more than there is.

    That is taken of all layers of the model, so that memory stays a straight line in the stage's.
    """
    layers = [row for row in rows if row[0].isdigit()]
    ends = [row for row in rows if not row[0].isdigit()]
    bucket = sym.larger(term("bucket_params"), worst(layers, "{x}_largest_params"))
    streamed = sym.larger(
        term("streamed_bytes_per_param") * bucket,
        term("streamed_end_bytes_per_param") * worst(ends, "{x}_largest_params"),
    )
    every = term("all_layers_params")
    of_layers = term("hosted_weights_bytes_per_param") + term("hosted_grads_bytes_per_param")
    hosted = (every + of_blocks(ends, "trainable_params")) * term("hosted_bytes_per_param")
    return sym.smaller(streamed, hosted + every * of_layers)


def _lone() -> Expr:
    """1 where a step has one micro-batch, else 0."""
    return 1 - sym.smaller(1, sym.NUM_MICRO_BATCHES - 1)


def gradients_bytes(rows: list[Row]) -> Expr:
    """Bytes of gradients on the device amid a step."""
    layers = of_blocks([row for row in rows if row[0].isdigit()], "trainable_params")
    ends = params_of(rows, "trainable_params") - layers
    return layers * term("layer_grads_bytes_per_param") + ends * term("grads_bytes_per_param")
