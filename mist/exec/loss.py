"""The loss of a micro-batch as a sum over tokens, so that micro-batches and ranks can be added.

    loss of a step = sum over micro-batches m of total_m / sum over m of number_m

A loss that is a mean counts as total = mean * number, where the number is what the mean was divided
by: the targets that its cross-entropies counted (those that are not `ignore_index`); where it calls
none, the unmasked labels of the batch; where there are none either, its samples. The first is exact
whatever a model does with its labels (Hugging Face: causal models shift them, others do not).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from mist.trace.loader import LABELS, LoadedModel

MASKED: Final = -100  # torch's ignore_index: a label that is not learned
CROSS_ENTROPIES: Final = ("cross_entropy", "nll_loss")


def summed_loss(loaded: LoadedModel, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and loss of a micro-batch: the sum, and the number of what it is a sum over.

    Nothing to learn in a micro-batch gives a sum of 0 and gradients of 0.
    """
    with _counting() as counted:
        output = loaded.forward(batch)
        loss, number = loaded.loss_of(output, batch)
    plain = (loss.to_local() if isinstance(loss, DTensor) else loss).reshape(())
    total = plain.to(torch.promote_types(plain.dtype, torch.float32))
    if number is not None:
        return total, torch.as_tensor(number, device=total.device)
    if counted:
        count = torch.stack(counted).sum()
    elif (labels := _labels(batch)) is not None:
        count = (labels != MASKED).sum()
        _drop_gradients(output, count == 0)
    else:
        count = torch.tensor(tree_leaves(batch)[0].shape[0], device=total.device)
    return torch.where(count == 0, 0.0, total * count), count


def _labels(batch: object) -> torch.Tensor | None:
    labels = batch.get(LABELS) if isinstance(batch, Mapping) else None
    known = isinstance(labels, torch.Tensor) and not labels.is_floating_point()
    return labels if known else None


def _drop_gradients(output: object, empty: torch.Tensor) -> None:
    """No gradient where nothing is learned: a mean over nothing has gradients that are no number.

    In place where it can be, since logits are large; all of it belongs to this micro-batch.
    """

    def drop(gradient: torch.Tensor) -> torch.Tensor:
        fill = gradient.masked_fill_ if gradient.is_contiguous() else gradient.masked_fill
        return fill(empty, 0.0)

    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaf.register_hook(drop)


@contextmanager
def _counting() -> Iterator[list[torch.Tensor]]:
    """Within: cross-entropies that are means note the number of targets that they divide by."""
    counted: list[torch.Tensor] = []
    with ExitStack() as stack:
        for name in CROSS_ENTROPIES:
            stack.enter_context(patch.object(F, name, _noting(getattr(F, name), counted)))
        yield counted


def _noting(
    original: Callable[..., torch.Tensor], counted: list[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A cross-entropy as torch's, but its mean over nothing is 0."""
    form = signature(original)

    @wraps(original)
    def around(*args: object, **kwargs: object) -> torch.Tensor:
        call = form.bind(*args, **kwargs)
        call.apply_defaults()
        given: dict[str, Any] = call.arguments
        target, weight = given["target"], given["weight"]
        old_names = given["size_average"], given["reduce"]
        if (*old_names, given["reduction"]) != (None, None, "mean") or target.is_floating_point():
            return original(*args, **kwargs)  # class probabilities: a mean over samples
        counts = target != given["ignore_index"]
        shares = counts if weight is None else weight[target.where(counts, 0)] * counts
        counted.append(shares.sum())
        total = original(**{**given, "reduction": "sum"})
        return total / torch.where(counted[-1] == 0, 1, counted[-1])

    return around
