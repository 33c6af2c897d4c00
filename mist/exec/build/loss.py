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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mist.trace.models.loader import LoadedModel
from mist.trace.models.model_inputs import LABELS

MASKED: Final = -100  # torch's ignore_index: a label that is not learned
CROSS_ENTROPIES: Final = (F.cross_entropy, F.nll_loss)


def summed_loss(loaded: LoadedModel, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and loss of a micro-batch: the sum, and the number of what it is a sum over.

    Nothing to learn in a micro-batch gives a sum of 0 and gradients of 0.
    """
    counted: list[torch.Tensor] = []
    with _in_modules(counted):
        output = loaded.forward(batch)
    # Only the loss runs under the mode: there a model file may hold cross-entropies by names of its
    # own.
    with _Counting(counted):
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
    # A mean over nothing is no number; its sum is 0.
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
def _in_modules(counted: list[torch.Tensor]) -> Iterator[None]:
    """Within: cross-entropies by which modules make means note the number of their targets.

    They find them in `torch.nn.functional`; a mode would slow down every operation of the model.
    """
    with ExitStack() as stack:
        for original in CROSS_ENTROPIES:
            noting = _noting(original, counted)
            stack.enter_context(patch.object(F, original.__name__, noting))
        yield


class _Counting(TorchFunctionMode):
    """The same within a loss, however it has imported them."""

    def __init__(self, counted: list[torch.Tensor]) -> None:
        super().__init__()
        self._noting = {each: _noting(each, counted) for each in CROSS_ENTROPIES}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        run: Callable[..., Any] = self._noting.get(func, func)
        return run(*args, **(kwargs or {}))


def _noting(
    original: Callable[..., torch.Tensor], counted: list[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A cross-entropy as torch's, but its mean over nothing is 0."""
    form = signature(original)

    @wraps(original)
    def around(*args: object, **kwargs: object) -> torch.Tensor:
        call = form.bind(*args, **kwargs)
        call.apply_defaults()
        arguments: dict[str, Any] = call.arguments
        target, weight = arguments["target"], arguments["weight"]
        old_names = arguments["size_average"], arguments["reduce"]
        is_mean = old_names == (None, None) and arguments["reduction"] == "mean"
        # Targets of floats are class probabilities: their mean is over samples.
        if not is_mean or target.is_floating_point():
            return original(*args, **kwargs)
        counts = target != arguments["ignore_index"]
        # ignore_index is no index of a class: it must not reach the weights.
        shares = counts if weight is None else weight[target.where(counts, 0)] * counts
        counted.append(shares.sum())
        total = original(**{**arguments, "reduction": "sum"})
        return total / torch.where(counted[-1] == 0, 1, counted[-1])

    return around
