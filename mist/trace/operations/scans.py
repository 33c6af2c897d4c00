"""Scans over a sequence as autograd runs their kernels: what is kept, in which order they run.

Each class is the autograd function of the package that its kernels come from (see `scan_kernels`):
ChunkGatedDeltaRuleFunction and ChunkKDAFunction of flash-linear-attention, MambaChunkScanCombinedFn
and SelectiveScanFn of mamba_ssm. They keep little for the backward pass, and make the states of the
chunks again there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.autograd.function import FunctionCtx

from mist.trace.expressions import Size
from mist.trace.operations.scan_kernels import scan_kernel

CHUNK: Final = 64  # tokens, in all of flash-linear-attention's gated delta rules
UNGATED: Final = ("u", "dt", "a", "b", "c", "skip", "dt_bias", "states")  # kept of such a scan
PIECE: Final = 2048  # tokens between two states that mamba_ssm's selective scan keeps

Gradients = tuple[torch.Tensor | None, ...]


class ScanContext(FunctionCtx):
    """What the backward pass of a scan finds."""

    saved_tensors: tuple[Any, ...]  # tensors, or None where an input is left out
    sizes: Mapping[str, Size]


def _tokens(size: Size, chunk: int) -> dict[str, Size]:
    """Tokens, those of a chunk, chunks, and the tokens of whole chunks."""
    chunks = (size + chunk - 1) // chunk
    return {"s": size, "c": chunk, "n": chunks, "z": chunks * chunk}


def _letters(letters: str, sizes: Sequence[Size]) -> dict[str, Size]:
    return dict(zip(letters, sizes, strict=True))


def _delta_sizes(q: torch.Tensor, v: torch.Tensor) -> dict[str, Size]:
    batch, tokens, key_heads, key_size = q.shape
    heads, value_size = v.shape[2:]
    sizes = _letters("bqhkv", (batch, key_heads, heads, key_size, value_size))
    return sizes | _tokens(tokens, CHUNK)


def _of_key_heads(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient of each value head's key [b, s, h, k] summed over the heads that share it."""
    heads = like.shape[2]
    if gradient.shape[2] != heads:
        gradient = gradient.unflatten(2, (heads, gradient.shape[2] // heads)).sum(3)
    return gradient.to(like.dtype)


class UnitVectors(torch.autograd.Function):
    """Queries or keys x [b, s, h, k] divided by their lengths; keeps the result."""

    @staticmethod
    def forward(ctx: ScanContext, x: torch.Tensor) -> torch.Tensor:
        """The unit vectors [b, s, h, k]."""
        ctx.sizes = _letters("bsqk", x.shape)
        unit, length = scan_kernel("unit_vectors", [x], ctx.sizes)
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: ScanContext, grad: torch.Tensor) -> torch.Tensor:
        """The gradient [b, s, h, k]."""
        return scan_kernel("unit_vectors_backward", [*ctx.saved_tensors, grad], ctx.sizes)[0]


class GatedDeltaRule(torch.autograd.Function):
    """q, k [b, s, q, k], v [b, s, h, v], decay g and beta [b, s, h]: the result [b, s, h, v]."""

    @staticmethod
    def forward(ctx: ScanContext, *inputs: Any) -> torch.Tensor:  # noqa: ANN401 (tensors, or None)
        """The result, chunk after chunk."""
        q, k, v, g, beta = inputs
        sizes = ctx.sizes = _delta_sizes(q, v)
        (decay,) = scan_kernel("decay_in_chunks", [g], sizes)
        (solved,) = scan_kernel("keys_solve", [k, decay, beta], sizes)
        w, u = scan_kernel("keys_and_values", [k, v, beta, solved, decay], sizes)
        states, new_v = scan_kernel("chunk_states", [k, w, u, decay], sizes)
        (out,) = scan_kernel("chunk_outputs", [q, k, new_v, states, decay], sizes)
        ctx.save_for_backward(q, k, v, decay, beta, solved)
        return out

    @staticmethod
    def backward(ctx: ScanContext, grad: torch.Tensor) -> Gradients:
        """The gradients, the states of the chunks made again."""
        q, k, v, decay, beta, solved = ctx.saved_tensors
        sizes = ctx.sizes
        w, u = scan_kernel("keys_and_values", [k, v, beta, solved, decay], sizes)
        states, new_v = scan_kernel("chunk_states", [k, w, u, decay], sizes)
        (grad_v,) = scan_kernel("values_backward", [q, k, decay, grad], sizes)
        grad_states, grad_v = scan_kernel(
            "chunk_states_backward", [q, k, w, decay, grad, grad_v], sizes
        )
        inputs = [q, k, new_v, w, decay, states, grad_v, grad, grad_states]
        grad_q, grad_k, grad_w, grad_g = scan_kernel("chunk_outputs_backward", inputs, sizes)
        inputs = [k, v, beta, decay, solved, grad_w, grad_v]
        more_k, grad_v, grad_beta, more_g = scan_kernel("keys_solve_backward", inputs, sizes)
        grad_k.add_(more_k)
        grad_g.add_(more_g)
        (grad_g,) = scan_kernel("decay_in_chunks", [grad_g], sizes)
        grad_q, grad_k = _of_key_heads(grad_q, q), _of_key_heads(grad_k, k)
        return grad_q, grad_k, grad_v, grad_g, grad_beta.to(beta.dtype)


class ChannelDeltaRule(torch.autograd.Function):
    """As `GatedDeltaRule` with a decay g [b, s, h, k] of each channel of a key."""

    @staticmethod
    def forward(ctx: ScanContext, *inputs: Any) -> torch.Tensor:  # noqa: ANN401 (tensors, or None)
        """The result, chunk after chunk."""
        q, k, v, g, beta = inputs
        sizes = ctx.sizes = _delta_sizes(q, v)
        (decay,) = scan_kernel("channel_decay_in_chunks", [g], sizes)
        w, u, decayed_k, scores, solved = scan_kernel(
            "channel_keys_solve", [k, q, v, decay, beta], sizes
        )
        states, new_v = scan_kernel("chunk_states", [decayed_k, w, u, decay], sizes)
        (out,) = scan_kernel("channel_outputs", [q, new_v, decay, scores, states], sizes)
        ctx.save_for_backward(q, k, v, decay, g, beta, scores, solved)
        return out

    @staticmethod
    def backward(ctx: ScanContext, grad: torch.Tensor) -> Gradients:
        """The gradients, the states of the chunks made again."""
        q, k, v, decay, g, beta, scores, solved = ctx.saved_tensors
        sizes = ctx.sizes
        w, u, decayed_q, decayed_k = scan_kernel(
            "channel_keys_and_values", [k, q, v, beta, solved, decay], sizes
        )
        states, new_v = scan_kernel("chunk_states", [decayed_k, w, u, decay], sizes)
        grad_v, grad_scores = scan_kernel("channel_values_backward", [new_v, scores, grad], sizes)
        grad_states, grad_v = scan_kernel(
            "chunk_states_backward", [decayed_q, decayed_k, w, decay, grad, grad_v], sizes
        )
        inputs = [q, k, v, new_v, decay, beta, solved, states, grad, grad_states, grad_v]
        grad_q, grad_k, grad_v, grad_g, grad_beta, grad_solved = scan_kernel(
            "channel_outputs_backward", inputs, sizes
        )
        inputs = [q, k, decay, beta, grad_scores, grad_solved, grad_q, grad_k, grad_beta, grad_g]
        grad_q, grad_k, grad_beta, grad_g = scan_kernel(
            "channel_keys_solve_backward", inputs, sizes
        )
        (grad_g,) = scan_kernel("channel_decay_in_chunks", [grad_g], sizes)
        grad_q, grad_k = _of_key_heads(grad_q, q), _of_key_heads(grad_k, k)
        return grad_q, grad_k, grad_v, grad_g.to(g.dtype), grad_beta.to(beta.dtype)


class StateSpaceDuality(torch.autograd.Function):
    """x [b, s, h, p], dt [b, s, h], a [h], groups b and c [b, s, g, d]: the result [b, s, h, p]."""

    @staticmethod
    def forward(ctx: ScanContext, *inputs: Any) -> torch.Tensor:  # noqa: ANN401 (tensors, or None)
        """The result; `skip` [h] times x is added to it, `dt_bias` [h] to dt."""
        x, dt, a, b, c, chunk, skip, dt_bias = inputs
        batch, tokens, heads, head_size = x.shape
        shape = (batch, heads, head_size, *b.shape[2:])
        sizes = ctx.sizes = _tokens(tokens, chunk) | _letters("bhpgd", shape)
        decay, steps = scan_kernel("ssd_decay", [dt, a, dt_bias], sizes)
        (states,) = scan_kernel("ssd_states", [b, x, steps, decay], sizes)
        states, _ = scan_kernel("ssd_pass_states", [c, states, decay], sizes)
        (scores,) = scan_kernel("ssd_scores", [c, b], sizes)
        operands = [x, scores, steps, decay, c, states, skip]
        (out,) = scan_kernel("ssd_outputs", operands, sizes)
        ctx.save_for_backward(x, dt, a, b, c, skip, dt_bias, out, decay)
        return out

    @staticmethod
    def backward(ctx: ScanContext, grad: torch.Tensor) -> Gradients:
        """The gradients, the states of the chunks made again."""
        x, dt, a, b, c, skip, dt_bias, _, decay = ctx.saved_tensors
        sizes = ctx.sizes
        decay, steps = scan_kernel("ssd_decay", [dt, a, dt_bias], sizes)
        (scores,) = scan_kernel("ssd_scores", [c, b], sizes)
        (states,) = scan_kernel("ssd_states", [b, x, steps, decay], sizes)
        states, _ = scan_kernel("ssd_pass_states", [states, decay], sizes)
        (grad_states,) = scan_kernel("ssd_states_backward", [c, decay, grad], sizes)
        inputs = [x, states, decay, grad_states]
        grad_states, states, _ = scan_kernel("ssd_pass_states_backward", inputs, sizes)
        inputs = [x, scores, grad, steps, decay, b, grad_states, skip]
        grad_x, grad_steps, grad_skip = scan_kernel("ssd_inputs_backward", inputs, sizes)
        inputs = [x, steps, decay, grad_states, b]
        grad_b, _ = scan_kernel("ssd_group_states_backward", inputs, sizes)
        inputs = [states, decay, grad, c]
        grad_c, _ = scan_kernel("ssd_group_states_backward", inputs, sizes)
        (grad_scores,) = scan_kernel("ssd_scores_backward", [x, steps, decay, grad], sizes)
        (grad_b,) = scan_kernel("ssd_groups_backward", [c, grad_scores, grad_b], sizes)
        (grad_c,) = scan_kernel("ssd_groups_backward", [b, grad_scores, grad_c], sizes)
        inputs = [x, steps, decay, grad, scores]
        (grad_decay,) = scan_kernel("ssd_decay_of_scores_backward", inputs, sizes)
        inputs = [dt, grad_decay, grad_steps, a, dt_bias]
        grad_dt, grad_a, grad_bias = scan_kernel("ssd_decay_backward", inputs, sizes)
        of_skip = None if skip is None else grad_skip.to(skip.dtype)
        of_bias = None if dt_bias is None else grad_bias.to(dt_bias.dtype)
        return grad_x, grad_dt, grad_a.to(a.dtype), grad_b, grad_c, None, of_skip, of_bias


class SelectiveScan(torch.autograd.Function):
    """u, dt and gate z [b, e, s], a [e, d], b and c [b, d, s]: the result [b, e, s]."""

    @staticmethod
    def forward(ctx: ScanContext, *inputs: Any) -> torch.Tensor:  # noqa: ANN401 (tensors, or None)
        """The result; `skip` [e] times u is added to it, `dt_bias` [e] to dt."""
        u, dt, a, b, c, skip, z, dt_bias = inputs
        u, dt, b, c = (each.contiguous() for each in (u, dt, b, c))
        batch, channels, tokens = u.shape
        # Of each piece the kernel keeps its state and the product of its decays.
        pieces = (tokens + PIECE - 1) // PIECE
        sizes = ctx.sizes = _letters("besdm", (batch, channels, tokens, a.shape[1], 2 * pieces))
        name, gate = ("selective_scan", []) if z is None else ("gated_scan", [z.contiguous()])
        made = scan_kernel(name, [u, dt, a, b, c, skip, dt_bias, *gate], sizes)
        # With a gate the result before it is kept, too.
        before = made[:1] if gate else []
        ctx.save_for_backward(u, dt, a, b, c, skip, dt_bias, made[1], *gate, *before)
        return made[-1] if gate else made[0]

    @staticmethod
    def backward(ctx: ScanContext, grad: torch.Tensor) -> Gradients:
        """The gradients, the scan made again from the states of its pieces."""
        saved = ctx.saved_tensors
        name = "selective_scan_backward" if len(saved) == len(UNGATED) else "gated_scan_backward"
        made = scan_kernel(name, [*saved, grad], ctx.sizes)
        of = [*saved[: len(UNGATED) - 1], *saved[len(UNGATED) : len(UNGATED) + 1]]
        grads = [None if t is None else g.to(t.dtype) for g, t in zip(made, of, strict=True)]
        return (*grads[:6], grads[7] if len(grads) > len(UNGATED) - 1 else None, grads[6])
