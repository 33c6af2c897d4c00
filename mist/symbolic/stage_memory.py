"""Peak memory of a stage: what lives at each instant of a step that may be the largest.

    peak = states + activations + gathered + buffers + max over instants of working, + allocator

One backward pass of a micro-batch under FSDP2, on a stage that has embedding and head. Layers run
from the last, n, to the first; embedding and head are one group of parameters, the root, which is
reduced last. # lives, < grows, > shrinks, . nothing; numbers say of which layer.

                            loss  head  layer n    ...    layer 1  embed  root is   optimizer
                                                                          reduced   steps
    states                  ####  ####  #######  #######  #######  #####  ########  ########
    activations of layers   ####  ####  #######  >>>>>>>  1>>>>>>  .....  ........  ........
    activations of the head ####  >>>>  .......  .......  .......  .....  ........  ........
    gathered, ZeRO-3: root  ####  ####  #######  #######  #######  #####  ########  ........
              layers        n     n     n, n-1   i, i-1   1        .....  ........  ........
    gradients in compute
    precision: of the head  ....  <<<<  #######  #######  #######  #####  >>>>>>>>  ........
               of a layer   ....  ....  n<<<<<>  i<<<<<>  1<<<<<>  .....  ........  ........
    fp32 buffer of the      root of the          i+1      2        1      root      ........
    reduction before        micro-batch before
    working set             loss  head  n        i        1        embed  ........  buckets
    ------------------------------------------------------------------------------------------
    candidate instants      |-- `backward_begin` --|      |--- `backward_end` ---|  `optimizer_step`

The layers that keep least come first in a stage (`StagePlan.levels`). So memory falls or rises
through all of a backward pass, and only its two ends can be the peak. Layers that keep less may
need more as they run: `layers_working_set` says when they do. Where gradients wait (several
chunks, a split backward pass) the last backward pass of a step is a candidate of its own
(`last_backward`). So is the forward pass of blocks that the trace says may hold more in it
(`forward_pass`). The search relies on each instant being linear in the numbers of layers.

Instants are counted on top of states, activations, gathered and buffers as a backward pass begins,
so what was freed by then counts as negative.

F (`sym.FORWARD_FIRST`) is 1 where all forward passes of a step come before the first backward
pass: GPipe, 1F1B on a stage that holds all G, G = 1. Then the first backward pass meets most
activations, and no gradients exist as it begins. Otherwise a micro-batch in the middle of the step
is the worst, and fp32 gradients of those before it are part of the states.

The order of events is that of torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py; what lives
was checked against dry runs of the real program (docs/verify.md). Runtimes without a root group
(`transients.root_group`) hold what their profile says per parameter of the largest block.
"""

from collections.abc import Mapping

import sympy
from sympy import Expr

from mist.plans.memory_levels import KEEPS_ALL
from mist.plans.numerics import Numerics
from mist.platform.runtime import Runtime
from mist.symbolic import symbols as sym
from mist.symbolic.block_sums import (
    StageBlocks,
    least_of,
    max_over,
    params_of,
    sum_over,
    term,
)
from mist.symbolic.host_bytes import offloaded_bytes
from mist.symbolic.optimizer_memory import stream_bytes
from mist.symbolic.stream_pools import idle_bytes
from mist.symbolic.working_set import (
    first_gradients,
    forward_pass,
    fresh_gradients,
    layers_working_set,
    working_set,
)
from mist.symbolic.zero_bubble_memory import (
    input_gradients_begin,
    input_gradients_end,
    split_or_whole,
)

# Share of the gradients of a stage that do not exist when it holds most: all of them in the first
# backward pass of a step; where several chunks run one round, those of all chunks but the first
# that goes backward.
PENDING_GRADIENTS_RATIO = sym.FORWARD_FIRST + (1 - sym.FORWARD_FIRST) * sym.ONE_ROUND * (
    1 - 1 / sym.CHUNKS
)


def stage_memory(blocks: StageBlocks, runtime: Runtime, numerics: Numerics) -> dict[str, Expr]:
    """Bytes of the parts of the peak, of the peak, which is their sum, and of each instant.

    Instants: `begin_bytes`, `end_bytes` of a backward pass, `last_bytes` of the last one,
    `step_bytes` of the optimizer. The peak is the largest of them.
    """
    states, activations = _states(blocks), activations_bytes(blocks)
    buffers = _buffers(blocks, runtime)
    if runtime.transients.root_group:
        states -= PENDING_GRADIENTS_RATIO * gradient_bytes(blocks)
        gathered = term("zero3_copy_bytes_per_param") * params_of(blocks.ends)
        gathered += _next_layer(blocks)
        instants = _fsdp_instants(blocks, numerics)
    else:
        layer = max_over(blocks.every, "{x}_params")
        stream = term("stream_bytes_per_param") * layer
        working = sym.larger(max_over(blocks.every, "{x}_{level}_working_bytes"), stream)
        if blocks.forward:
            working = sym.larger(working, forward_pass(blocks))
        gathered = term("gathered_bytes_per_param") * layer
        instants = dict.fromkeys(("begin_bytes", "end_bytes", "last_bytes"), working)
    # As the optimizer steps no activations are left and nothing is gathered.
    instants["step_bytes"] = optimizer_step(blocks, runtime) - activations - gathered
    whole = states + activations + gathered + buffers
    reserved = _with_idle(instants, blocks, runtime)
    # The instants are the same for some runtimes: each enters the maximum once.
    working, most = (sym.larger(*dict.fromkeys(each.values())) for each in (instants, reserved))
    overhead = runtime.memory.allocator_overhead_ratio.value
    parts = {
        "states_bytes": states,
        "activations_bytes": activations,
        "working_bytes": working,
        "gathered_bytes": gathered,
        "buffers_bytes": buffers,
        "allocator_bytes": overhead * (whole + most) + most - working,
    }
    at_instants = {name: (1 + overhead) * (whole + size) for name, size in reserved.items()}
    return {**parts, "peak_bytes": sympy.Add(*parts.values()), **at_instants}


def _with_idle(
    instants: Mapping[str, Expr], blocks: StageBlocks, runtime: Runtime
) -> dict[str, Expr]:
    """The instants with what is reserved for streams of FSDP and idle then."""
    pending = PENDING_GRADIENTS_RATIO * gradient_bytes(blocks)
    begin, end, always = idle_bytes(blocks, runtime.transients, pending)
    # Instants that are the last backward pass's own count all gradients as live.
    last = (1 - sym.SEVERAL_CHUNKS - _is_split_last() - _is_lone_last()) * begin
    idle = {"begin_bytes": begin, "end_bytes": end, "last_bytes": last, "step_bytes": 0}
    return {name: size + idle[name] + always for name, size in instants.items()}


# What lives through all of a step, or as long as a micro-batch is in flight.


def _states(blocks: StageBlocks) -> Expr:
    """Parameters, gradients between two micro-batches and moments on the device; buffers."""
    trainable = params_of(blocks.every, "trainable_params")
    frozen = params_of(blocks.every) - trainable
    states = trainable * term("state_bytes_per_param") - offloaded_bytes(blocks)
    held = sum_over(blocks.every, "{x}_buffer_bytes")
    return states + frozen * term("frozen_bytes_per_param") + held


def gradient_bytes(blocks: StageBlocks) -> Expr:
    """fp32 gradients on the device between two micro-batches, which are part of the states."""
    layers = sum_over(blocks.layers, "{x}_trainable_params")
    ends = params_of(blocks.every, "trainable_params") - layers
    return layers * term("layer_grads_bytes_per_param") + ends * term("grads_bytes_per_param")


def activations_bytes(blocks: StageBlocks) -> Expr:
    """What is kept of the micro-batches in flight, and of those that wait for W.

    The head's backward pass follows its forward pass at once, so it keeps fewer micro-batches than
    the layers do (`HEAD_HELD`); chunks of unequal length keep more (`LAYERS_MORE`), and the chunk
    of the embedding another number (`EMBED_MORE`). Of a micro-batch that waits for W the head still
    keeps what it saved before the loss.
    """
    embed, head = (term(f"{end}_none_kept_bytes") for end in ("embed", "head"))
    kept = (sym.IN_FLIGHT + sym.LAYERS_MORE) * sum_over(blocks.layers, "{x}_{level}_kept_bytes")
    kept += sym.IN_FLIGHT * sym.CHUNKS * term("shared_bytes")
    kept += sym.FIRST * (sym.IN_FLIGHT + sym.EMBED_MORE) * embed + sym.LAST * sym.HEAD_HELD * head
    of_head = sym.LAST * sym.CHUNKS * (term("head_early_bytes") + term("head_awaited_bytes"))
    return kept + sym.WAITING * (sum_over(blocks.layers, "{x}_awaited_bytes") + of_head)


def _buffers(blocks: StageBlocks, runtime: Runtime) -> Expr:
    """Buffers of transfers between stages, of communication, and of offloaded activations."""
    fixed = runtime.memory.fixed_bytes.value
    fixed += runtime.memory.buffer_ratio.value * term("activation_bytes")
    fixed += max_over(blocks.every, "{x}_{level}_staged_bytes")
    return _boundary_buffers(blocks, runtime) + fixed


def _boundary_buffers(blocks: StageBlocks, runtime: Runtime) -> Expr:
    """Activations and gradients at the borders of the chunks of a stage.

    torch's stages hold inputs and outputs as long as what their micro-batch saved (`fwd_cache` of
    torch/distributed/pipelining/stage.py). Other runtimes have buffers to receive into, one each
    way for each chunk.
    """
    if not runtime.memory.keeps_outputs:
        return (2 * sym.CHUNKS - sym.LAST - sym.FIRST) * term("p2p_bytes")
    chunks = sym.CHUNKS * sym.IN_FLIGHT
    # The last chunk of the model sends nothing: its output goes into the loss.
    outputs = chunks - sym.LAST * (sym.HEAD_HELD + sym.CHUNKS * sym.WAITING)
    # A gradient that is received. The last stage receives none, or two if it has several chunks.
    gradients = 1 - sym.LAST + 2 * sym.SEVERAL_CHUNKS * sym.LAST
    # Several chunks, and a split backward pass, receive an input ahead of its forward pass.
    ahead = sym.larger(sym.SEVERAL_CHUNKS, sym.SPLITS * (1 - sym.FIRST))
    # What each chunk sent last is held until the next transfer; nothing before any backward pass.
    sent = (1 - sym.FORWARD_FIRST) * (sym.CHUNKS - sym.FIRST)
    # Inputs count where the first layer does not save its own. Layers that keep least come first
    # and save their input, so that is so only of stages all of whose layers keep everything.
    inputs = chunks - sym.FIRST * (sym.IN_FLIGHT + sym.EMBED_MORE)
    all_none = [row for row in blocks.layers if row[1] == KEEPS_ALL]
    recomputed = [count for _, level, count in blocks.layers if level != KEEPS_ALL]
    inputs *= 1 - sym.smaller(1, sympy.Add(*recomputed))
    transfers = (outputs + gradients + ahead + sent) * term("p2p_bytes")
    return transfers + inputs * max_over(all_none, "{x}_input_bytes")


# The instants that may be the peak.


def _fsdp_instants(blocks: StageBlocks, numerics: Numerics) -> dict[str, Expr]:
    """The instants of a backward pass, whole or split, of one chunk or several."""
    # Other chunks of the rank went backward before, and each still holds its last reduction's
    # buffer. Not in the first backward pass of a step, nor amid a single round.
    buffers = _other_chunks_buffers(blocks)
    amid = 1 - sym.FORWARD_FIRST
    buffers *= amid * (1 - sym.ONE_ROUND)
    begin = backward_begin(blocks, numerics, amid * _root_buffer(blocks))
    end = backward_end(blocks, numerics)
    begin = split_or_whole(input_gradients_begin(blocks, begin), begin + buffers)
    if blocks.forward:
        begin = sym.larger(begin, forward_pass(blocks) + amid * _root_buffer(blocks))
    return {
        "begin_bytes": begin,
        "end_bytes": split_or_whole(input_gradients_end(blocks), end + buffers),
        "last_bytes": last_backward(blocks, numerics, begin),
    }


def backward_begin(blocks: StageBlocks, numerics: Numerics, root_buffer: Expr) -> Expr:
    """As a backward pass begins: in the loss, then in the layers that run first.

        max( working set of head and loss + buffer, on the last stage;
             a layer that runs backward - what the head kept )

    The last layer runs beside the root's buffer. Those before it run beside a layer's, and have
    what the last one kept for that, less its gradients where states have none of these yet; as
    gradients are copied, what their layer kept is gone for the gradient of its input.
    `root_buffer`: what the root's reduction in the micro-batch before still holds.
    """
    head = [row for row in blocks.ends if row[0] == "head"]
    loss = working_set(head, numerics) + sym.LAST * root_buffer
    head_kept = sym.LAST * term("head_none_kept_bytes")
    least = least_of(blocks.layers, "{x}_{level}_kept_bytes")
    left = first_gradients("layer_") * max_over(blocks.layers, "{x}_trainable_params")
    layer = layer_backward(
        blocks,
        numerics,
        root_buffer,
        gone=sym.larger(0, least - left),
        gone_as_copied=sym.larger(0, least - term("activation_bytes")),
    )
    return sym.larger(0, loss, layer - head_kept)


def layer_backward(
    blocks: StageBlocks,
    numerics: Numerics,
    root_buffer: Expr,
    *,
    gone: Expr = sympy.S.Zero,
    gone_as_copied: Expr = sympy.S.Zero,
) -> Expr:
    """While the worst layer runs backward, then as FSDP2 copies its gradients to fp32.

    max( working set + fp32 buffer of the group that was reduced before;
         gradients in compute precision + their fp32 copy, or the copies of a lone rank )
    + gradients of the head + [ZeRO-3] the gathered layer

    `gone`: what was freed before the buffer is a layer's, `gone_as_copied`: before the copies.
    """
    trainable = max_over(blocks.layers, "{x}_trainable_params")
    fp32 = term("fp32_bytes_per_param")
    # FSDP2 frees the buffer of a reduction as the next group begins its own. That is the layer
    # behind this one; for the last layer it is the root, of the micro-batch before. A lone
    # micro-batch reduces at every ZeRO level.
    layer_buffer = sym.larger(term("reduce_buffer_bytes_per_param"), sym.LONE * fp32) * trainable
    working = layers_working_set(blocks, numerics) + sym.larger(layer_buffer - gone, root_buffer)
    copies = _gradient_copies(numerics) * trainable - gone_as_copied
    gathered = term("zero3_copy_bytes_per_param") * max_over(blocks.layers, "{x}_params")
    return sym.larger(working, copies) + _head_gradients(numerics) + gathered


def _head_gradients(numerics: Numerics) -> Expr:
    """Gradients of the head wait for those of the embedding: the root is one group."""
    fresh = fresh_gradients(numerics) * term("compute_bytes_per_param")
    return sym.LAST * fresh * term("head_trainable_params")


def backward_end(blocks: StageBlocks, numerics: Numerics) -> Expr:
    """As a backward pass ends: in the first layer, then in the root's reduction.

        max( a layer that runs backward + its activations - its gradients, which that includes;
             max( copied gradients of the root; the optimizer's stream; `backward_begin` of the
                  next micro-batch ) + gradients of the root )
        + what the first backward pass leaves in all layers - all activations of the micro-batch

    Only a chunk's share, 1/v, of layers has run.
    """
    buffer = _root_buffer(blocks)
    root = params_of(blocks.ends, "trainable_params")
    most = max_over(blocks.layers, "{x}_{level}_kept_bytes")
    layer = most + layer_backward(
        blocks,
        numerics,
        (1 - sym.FORWARD_FIRST) * buffer,
        gone_as_copied=sym.larger(0, most - term("activation_bytes")),
    )
    # This layer's gradients are still among those that run; its gathered copy is still there.
    layer -= first_gradients("layer_") * max_over(blocks.layers, "{x}_trainable_params")
    layer += _dropped_copy() * max_over(blocks.layers, "{x}_params")
    # As the root is reduced no layer is gathered ahead. Behind it the optimizer's stream begins.
    reduction = _gradient_copies(numerics) * root - _next_layer(blocks)
    # The second backward pass of a step meets the gradients of the first: with F it may hold more,
    # though it begins with a micro-batch less.
    second = sym.FORWARD_FIRST * (1 - sym.LONE) * backward_begin(blocks, numerics, buffer)
    behind = sym.larger(reduction, stream_bytes(blocks), second) + first_gradients("") * root
    # All that the micro-batch kept is gone, but for the activations of the layer that runs.
    kept = sum_over(blocks.layers, "{x}_{level}_kept_bytes") / sym.CHUNKS
    kept += sum_over(blocks.ends, "{x}_{level}_kept_bytes") + term("shared_bytes")
    return sym.larger(layer, behind) + _after_first_backward(blocks) / sym.CHUNKS - kept


def last_backward(blocks: StageBlocks, numerics: Numerics, begin: Expr) -> Expr:
    """As the last backward pass of a step ends: all gradients exist, and one layer's activations.

    A candidate of its own only where gradients wait until then: with several chunks, where a split
    backward pass comes behind all forward passes (its gradients are reduced at the end of the step,
    a layer's in compute precision and in fp32 at once), and where a rank that divides nothing
    reduces behind several micro-batches (`_gradient_copies`). Else it is `begin`.
    """
    fp32 = term("fp32_bytes_per_param") * max_over(blocks.layers, "{x}_trainable_params")
    gradients = PENDING_GRADIENTS_RATIO * gradient_bytes(blocks) - activations_bytes(blocks)
    buffer = (1 - sym.FORWARD_FIRST) * _root_buffer(blocks)
    chunks = layer_backward(blocks, numerics, buffer) + _other_chunks_buffers(blocks)
    chunks += max_over(blocks.layers, "{x}_{level}_kept_bytes")
    # Below ZeRO-2 this backward pass is the first that reduces, so it needs a buffer, too.
    chunks += (1 - sym.FORWARD_FIRST) * (1 - term("reduces")) * fp32
    # Copies in compute precision are dropped behind the last backward pass.
    split = 2 * fp32 - term("resident_copy_bytes_per_param") * params_of(blocks.every)
    is_split, is_lone = _is_split_last(), _is_lone_last()
    # Of the root, or of the largest layer, whose copy in compute precision is dropped.
    copies = term("lone_copies_bytes_per_param")
    largest = sym.larger(
        max_over(blocks.layers, "{x}_trainable_params"), params_of(blocks.ends, "trainable_params")
    )
    lone = (copies - term("fp32_bytes_per_param")) * largest
    lone -= term("resident_copy_bytes_per_param") * sum_over(blocks.layers, "{x}_params")
    lone = sym.larger(lone, _lone_layers(blocks, numerics))
    return sympy.Add(
        sym.SEVERAL_CHUNKS * (gradients + chunks),
        is_split * (gradients + split),
        is_lone * (gradients + lone),
        (1 - sym.SEVERAL_CHUNKS - is_split - is_lone) * begin,
    )


def _lone_layers(blocks: StageBlocks, numerics: Numerics) -> Expr:
    """While the first two layers of a lone rank's last backward pass run, without the gradients.

    max( the last layer is reduced: input, quotient and output, of which states have one;
         the one before it runs, beside the buffer that this reduction leaves )

    The last layer's copy in compute precision is dropped before it is reduced, and what it kept
    but for the gradient of its input. Of small activations that is more than as the pass begins.
    """
    trainable = max_over(blocks.layers, "{x}_trainable_params")
    fp32 = term("fp32_bytes_per_param")
    least = least_of(blocks.layers, "{x}_{level}_kept_bytes")
    copied = (term("lone_copies_bytes_per_param") - fp32) * trainable + _head_gradients(numerics)
    copied -= sym.larger(0, least - term("activation_bytes"))
    running = layer_backward(blocks, numerics, fp32 * trainable) - least
    kept = sum_over(blocks.layers, "{x}_{level}_kept_bytes") + term("shared_bytes")
    kept += sym.FIRST * term("embed_none_kept_bytes")
    dropped = term("resident_copy_bytes_per_param") * least_of(blocks.layers, "{x}_params")
    return kept + sym.larger(copied, running) - dropped


def _is_split_last() -> Expr:
    """1 where a split backward pass comes behind all forward passes, of one chunk."""
    return sym.SPLITS * sym.FORWARD_FIRST * (1 - sym.SEVERAL_CHUNKS)


def _is_lone_last() -> Expr:
    """1 where a rank that divides nothing reduces behind several micro-batches, of one chunk."""
    is_lone = term("copies_alone") * (1 - term("reduces")) * (1 - sym.LONE)
    return is_lone * (1 - sym.SEVERAL_CHUNKS) * (1 - _is_split_last())


def optimizer_step(blocks: StageBlocks, runtime: Runtime) -> Expr:
    """As the optimizer steps: what it makes, and the gradients that the states do not count.

    The states count none with F, since none exist as the first backward pass begins: here are those
    that it leaves. And they do not count those of chunks that had not gone backward.
    """
    trainable = params_of(blocks.every, "trainable_params")
    step = trainable * term("step_bytes_per_param")
    if not runtime.transients.root_group:
        return step
    step += _after_first_backward(blocks)
    step += first_gradients("") * params_of(blocks.ends, "trainable_params")
    return step + (PENDING_GRADIENTS_RATIO - sym.FORWARD_FIRST) * gradient_bytes(blocks)


# Quantities that several instants share.


def _gradient_copies(numerics: Numerics) -> Expr:
    """Bytes per parameter as FSDP2 copies gradients of a group to fp32, on top of the states.

    It does so where a reduction takes them, and with the first gradients of a step; later ones are
    added to that copy. A rank that divides nothing copies what it reduces once more, and divides it
    (`foreach_reduce`). Below ZeRO-2 it does so in the last backward pass of a step, with gradients
    that states have but for a lone micro-batch. On the last stage that pass holds as much as the
    others.
    """
    reduces, fp32 = term("reduces"), term("fp32_bytes_per_param")
    copy = sym.larger(reduces, sym.FORWARD_FIRST) * fp32
    copies = fresh_gradients(numerics) * term("compute_bytes_per_param") + copy
    dropped = (1 - reduces) * term("resident_copy_bytes_per_param")
    lone = sym.larger(reduces, sym.LONE) * term("lone_copies_bytes_per_param")
    amid = (1 - sym.FORWARD_FIRST) * (1 - reduces) * sym.LAST * (1 - sym.SEVERAL_CHUNKS)
    lone += amid * (term("lone_copies_bytes_per_param") - fp32)
    return sym.larger(copies, lone - dropped)


def _root_buffer(blocks: StageBlocks) -> Expr:
    """fp32 buffer of the group that FSDP2 reduces last, until the next micro-batch reduces.

    It is the root. If a layer's input has no gradient (nothing before it is trained), autograd
    ends in that layer, and its post-backward hook runs behind the root's.
    """
    flows = [(count * term(f"{x}_without_gradient"), x) for x, _, count in blocks.layers]
    last = sympy.Add(*(count * term(f"{x}_trainable_params") for count, x in flows))
    no_such_layer = 1 - sym.smaller(1, sympy.Add(*(count for count, _ in flows)))
    last += no_such_layer * params_of(blocks.ends, "trainable_params")
    return term("reduce_buffer_bytes_per_param") * last


def _other_chunks_buffers(blocks: StageBlocks) -> Expr:
    """fp32 buffers of the last reductions of the other chunks of a rank, which reduce apart."""
    params = max_over(blocks.layers, "{x}_trainable_params")
    return (sym.CHUNKS - 1) * term("reduce_buffer_bytes_per_param") * params


def _next_layer(blocks: StageBlocks) -> Expr:
    """[ZeRO-3] The layer whose parameters FSDP2 gathers ahead of its backward pass, if any."""
    return term("zero3_copy_bytes_per_param") * max_over(blocks.layers, "{x}_backward_params")


def _dropped_copy() -> Expr:
    """Bytes per parameter that a layer frees behind the last backward pass (below ZeRO-3).

    `set_reshard_after_backward`: its copy in compute precision. Only if the first is the last.
    """
    return sym.FORWARD_FIRST * sym.LONE * term("resident_copy_bytes_per_param")


def _after_first_backward(blocks: StageBlocks) -> Expr:
    """What the first backward pass adds in all layers: gradients, less copies that are freed."""
    gradients = first_gradients("layer_") * sum_over(blocks.layers, "{x}_trainable_params")
    return gradients - _dropped_copy() * sum_over(blocks.layers, "{x}_params")
