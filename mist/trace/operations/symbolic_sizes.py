"""Functions of torch that take a size as a plain number, with a symbolic one in its place.

Such a number holds for one length only: the capacity of an expert is a share of the tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F


@contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Within: these functions take symbolic sizes, too."""
    with patch.object(F, "one_hot", partial(_one_hot, F.one_hot)):
        yield


def _one_hot(
    torchs: Callable[..., torch.Tensor], tensor: torch.Tensor, num_classes: int | torch.SymInt = -1
) -> torch.Tensor:
    """As torch makes it: zeros, and a one in each row."""
    if not isinstance(num_classes, torch.SymInt):
        return torchs(tensor, num_classes)
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=tensor.device)
    return zeros.scatter_(-1, tensor.unsqueeze(-1), 1)
