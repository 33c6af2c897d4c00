"""What a split backward pass keeps until it computes the gradients of parameters.

Zero bubble runs a backward pass in two halves: gradients of activations, then of parameters
(torch/distributed/pipelining/_backward.py). Between them torch holds the gradient of the result of
each operation where a parameter, or what is made of parameters alone (a transposed matrix, a cast),
meets an activation; and what autograd saved for the last of these operations and those before it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from mist.model.graph import SavedTensor


@dataclass(slots=True)
class Awaited:
    """The operations of a part where parameters meet activations.

    `gradients`: of their results, one each; `sequence`: autograd's number of the last of them;
    `parameter_storages`: storages that are made of parameters alone.
    """

    gradients: list[SavedTensor] = field(default_factory=list)
    sequence: int = -1
    parameter_storages: set[int] = field(default_factory=set)

    def read(
        self,
        inputs: Sequence[torch.Tensor],
        parameters: Collection[int],
        out: Sequence[torch.Tensor],
    ) -> torch.Tensor | None:
        """The result of a forward call where a parameter meets an activation, else None.

        `parameters`: the storages of those among the `inputs`.
        """
        of_parameters = [
            _key(t) in parameters or _key(t) in self.parameter_storages
            for t in inputs
            if t.requires_grad
        ]
        # A storage that is gone leaves its number to another one.
        self.parameter_storages.difference_update(map(_key, out))
        if of_parameters and all(of_parameters):
            self.parameter_storages.update(_key(t) for t in out if _key(t) not in parameters)
        if not any(of_parameters) or all(of_parameters):
            return None
        self.sequence = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        return next((t for t in out if t.is_floating_point() or t.is_complex()), None)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
