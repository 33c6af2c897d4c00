"""The last matrix and the cross-entropy in one, without all logits at once.

    logits_i = x_i W^T,  loss_i = logsumexp(logits_i) - logits_i[target_i]
    dlogits_i = softmax(logits_i) - onehot(target_i),  dx = dlogits W,  dW = dlogits^T x

x [n, h], W [V, h], targets [n]; logits of a chunk of rows at a time. `checkpointed` computes them
once more in the backward pass and keeps two fp32 numbers a row. `in-forward` computes the gradients
with the loss, and keeps them: it does no product twice. `none` is torch's own, which keeps all
logits. There are as many chunks whatever n is: so their operations are the same at every size, and
their rows, which a GPU wants to be many, grow with n.
Each runs on a part of the vocabulary, too, with three sums over the ranks of a group: of the
exponents, of the targets' logits, of dx.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mist.errors import InputError
from mist.layers.norm_kernels import wide
from mist.layers.recipes import apply_function
from mist.plans.workload import HeadMode

NUM_CHUNKS: Final = 16  # 0.25 GiB of fp32 logits of 8,192 tokens and 128 Ki words


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyPart:
    """The rows of W that this rank has: from `first`, of a vocabulary divided over `group`."""

    first: int
    group: dist.ProcessGroup

    def sum(self, x: Tensor) -> None:
        """Add up over the ranks, in place."""
        dist.all_reduce(x, group=self.group)

    def max(self, x: Tensor) -> None:
        """The largest over the ranks, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    ignore_index: int
    num_chunks: int
    keeps_logits: bool
    part: VocabularyPart | None

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The rows of each chunk; the last one has those that do not divide, too."""
        num_rows, others = tensors[0].shape[0], self.num_chunks - 1
        each = num_rows // self.num_chunks
        # No branch on the number of rows, which is a symbol where costs are traced.
        sizes = [each] * others + [num_rows - others * each]
        return zip(*(tensor.split_with_sizes(sizes) for tensor in tensors), strict=True)

    def targets(self, target: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The column of each row's target, 0 where it is not among ours, and whether it is."""
        column = target - (self.part.first if self.part else 0)
        ours = (target != self.ignore_index) & (column >= 0) & (column < size)
        return column.where(ours, 0)[:, None], ours[:, None]


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return wide(x @ weight.t())


def _row_losses(logits: Tensor, target: Tensor, setting: _Setting) -> tuple[Tensor, Tensor]:
    """Losses [c], and the two terms of logsumexp [c, 2], from logits [c, V] in fp32.

    The terms, the largest logit and the logarithm of the rest, stay two: their sum would lose the
    digits of the smaller one.
    """
    top = logits.amax(-1)
    if setting.part:
        setting.part.max(top)
    # Row by row exponents would need a second tensor as large as the logits; so does this, once.
    total = (logits - top[:, None]).exp_().sum(-1)
    column, ours = setting.targets(target, logits.shape[1])
    hit = (logits.gather(1, column) * ours)[:, 0]
    if setting.part:
        setting.part.sum(total)
        setting.part.sum(hit)
    rest = total.log()
    losses = (rest - (hit - top)).where(target != setting.ignore_index, 0.0)
    return losses, torch.stack((top, rest), -1)


def _gradient_of_logits(
    logits: Tensor, lse: Tensor, target: Tensor, factor: Tensor, setting: _Setting
) -> Tensor:
    """(softmax - onehot) * factor [c, V], in place of the logits; 0 for ignored targets."""
    column, ours = setting.targets(target, logits.shape[1])
    top, rest = lse.unsqueeze(1).unbind(-1)
    logits.sub_(top).sub_(rest).exp_().scatter_add_(1, column, -ours.to(logits.dtype))
    return logits.mul_((factor * (target != setting.ignore_index))[:, None])


class _Gradients:
    """Gradients of x and W, chunk by chunk; that of W is summed in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> None:
        self._weight, self._needs_x = weight, needs[0]
        # Not made where it is not needed, but rows of it are asked for all the same.
        self._dx = torch.empty_like(x) if needs[0] else x
        total = torch.zeros_like(weight, dtype=wide(weight[:0]).dtype) if needs[1] else None
        self._dweight = total

    @property
    def rows(self) -> Tensor:
        """Where the gradient of x goes, [n, h], to be cut into chunks."""
        return self._dx

    def add(self, dx: Tensor, x: Tensor, dlogits: Tensor, setting: _Setting) -> None:
        """Those of a chunk: x [c, h], dlogits [c, V]; `dx` [c, h] are its `rows`."""
        low = dlogits.to(x.dtype)
        if self._needs_x:
            part = low @ self._weight
            if setting.part:
                setting.part.sum(part)
            dx.copy_(part)
        if self._dweight is not None:
            self._dweight += low.t() @ x

    def made(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and W, in their types, where they are needed."""
        total, dx = self._dweight, self._dx if self._needs_x else None
        return dx, None if total is None else total.to(self._weight.dtype)


class ChunkedHead(torch.autograd.Function):
    """Sum of losses; keeps x, W, targets and the terms of logsumexp [n, 2]; logits if it should."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, setting: _Setting) -> Tensor:
        losses, sums, kept = [], [], []
        for x_rows, t in setting.chunks(x, target):
            logits = _logits(x_rows, weight)
            row_losses, lse = _row_losses(logits, t, setting)
            losses.append(row_losses.sum())
            sums.append(lse)
            kept += [logits] if setting.keeps_logits else []
        ctx.save_for_backward(x, weight, target, torch.cat(sums), *kept)
        ctx.setting = setting
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, target, lse, *kept = ctx.saved_tensors
        gradients = _Gradients(x, weight, ctx.needs_input_grad[:2])
        chunks = ctx.setting.chunks(x, gradients.rows, target, lse)
        for index, (x_rows, dx, t, row_lse) in enumerate(chunks):
            # Made again, or a copy: what is kept may go backward twice.
            logits = kept[index].clone() if kept else _logits(x_rows, weight)
            dlogits = _gradient_of_logits(logits, row_lse, t, grad, ctx.setting)
            gradients.add(dx, x_rows, dlogits, ctx.setting)
        return *gradients.made(), None, None


class InForwardHead(torch.autograd.Function):
    """Sum of losses; keeps the gradients of x and W, made with it, times `factor`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, setting: _Setting, factor: Tensor
    ) -> Tensor:
        gradients = _Gradients(x, weight, ctx.needs_input_grad[:2])
        losses = []
        for x_rows, dx, t in setting.chunks(x, gradients.rows, target):
            logits = _logits(x_rows, weight)
            row_losses, lse = _row_losses(logits, t, setting)
            losses.append(row_losses.sum())
            dlogits = _gradient_of_logits(logits, lse, t, factor, setting)
            gradients.add(dx, x_rows, dlogits, setting)
        ctx.save_for_backward(*gradients.made())
        return torch.stack(losses).sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        return dx, dweight, None, None, None


def head_loss(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    mode: HeadMode | str,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    num_chunks: int = NUM_CHUNKS,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Cross-entropy of x W^T against targets, a scalar in fp32 (fp64 where x is).

    x [..., h], weight [V, h], target [...] of integers. `mean` is over the targets that are not
    `ignore_index`; over none it is 0. `part`: weight is a rank's rows; x and the loss are the same
    on all ranks. Raises InputError for an unknown mode and for shapes that do not fit.
    """
    if mode not in set(HeadMode):
        raise InputError(f"head {str(mode)!r} is unknown. Known: {', '.join(HeadMode)}.")
    if x.shape[:-1] != target.shape or x.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"head: x {list(x.shape)}, weight {list(weight.shape)} and target "
            f"{list(target.shape)} do not fit. Expected [..., h], [V, h] and [...]."
        )
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(low), weight.to(low)
    rows, ids = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    count = (ids != ignore_index).sum().clamp(min=1).to(wide(x[:0]).dtype)
    factor = 1 / count if reduction == "mean" else torch.ones_like(count)
    setting = _Setting(
        ignore_index=ignore_index,
        num_chunks=num_chunks,
        keeps_logits=mode == HeadMode.NONE,
        part=part,
    )
    with torch.autocast(x.device.type, enabled=False):
        if mode == HeadMode.IN_FORWARD:
            return apply_function(InForwardHead, rows, weight, ids, setting, factor)
        if mode == HeadMode.CHECKPOINTED or part:
            return apply_function(ChunkedHead, rows, weight, ids, setting) * factor
        logits = wide(F.linear(rows, weight))
        return F.cross_entropy(logits, ids, ignore_index=ignore_index, reduction="sum") * factor
