"""Whether a batch has the shape that a plan is for.

Memory, transfers and schedule are those of the planned shape under every layout, so all layouts
refuse the same batches. Every rank is given the whole batch of a step and looks at all of it before
its first collective: all ranks refuse it with the same words, and none waits for another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import KeyPath, MappingKey, keystr, tree_flatten_with_path

from mist.errors import InputError
from mist.plans.workload import Workload
from mist.trace.models.loader import LoadedModel
from mist.trace.models.model_inputs import LABELS

# Inputs that a batch may have although the plan has not, with one entry for each token.
OF_TOKENS: Final = ("attention_mask", LABELS, "position_ids", "token_type_ids")
OPTIONAL: Final = "decoder_input_ids"  # made of the labels, where it is left out
WHOLE: Final = "tensor"  # the name of a batch that is one tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Shapes of the tensors of a step by name; `[num_samples, seq_len]` where they hold tokens.

    `is_open`: the model takes token ids and nobody said as what: they are the first tensor.
    """

    num_samples: int
    seq_len: int
    leaves: Mapping[str, tuple[int, ...]]
    is_open: bool

    def check(self, batch: object) -> None:
        """Raise InputError unless a batch fits."""
        leaves = _leaves(batch)
        expected = dict(self.leaves)
        if self.is_open and leaves:
            expected = {next(iter(leaves)): (self.num_samples, self.seq_len)}
        tokens = (self.num_samples, self.seq_len)
        extra = set(OF_TOKENS) - expected.keys()
        expected |= {name: tokens for name in extra if len(_shape(leaves.get(name))) == 2}
        if OPTIONAL not in leaves:
            expected.pop(OPTIONAL, None)
        fits = all(_shape(leaves.get(name)) == shape for name, shape in expected.items())
        # A planned tensor may have several rows for each sample (of its images).
        rows = [_shape(leaf)[:1] for name, leaf in leaves.items() if name not in self.leaves]
        whole = all((_shape(leaf) or (1,))[0] % self.num_samples == 0 for leaf in leaves.values())
        if fits and whole and all(first == tokens[:1] for first in rows):
            return
        actual = {name: _words(leaf) for name, leaf in leaves.items()}
        raise InputError(
            f"the batch does not fit the plan: a step takes {self.num_samples} samples of "
            f"{self.seq_len} tokens, as {_shapes_text(self.leaves)}; found {_shapes_text(actual)}. "
            "Give every rank all samples of a step in tensors whose first dimension counts them, "
            "or plan again with --seq and --global-batch of the batch."
        )


def planned_shape(loaded: LoadedModel, workload: Workload) -> BatchShape:
    """The shape of the batches of a plan, as the model file or the model makes them."""
    # make_batch of a model file allocates a whole step: on fake tensors only its shapes are made.
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = loaded.batch(workload.global_batch, workload.seq_len)
    return BatchShape(
        num_samples=workload.global_batch,
        seq_len=workload.seq_len,
        leaves={name: _shape(leaf) for name, leaf in _leaves(batch).items()},
        is_open=loaded.make_batch is None and isinstance(batch, torch.Tensor),
    )


def _leaves(batch: object) -> dict[str, object]:
    return {_name(path): leaf for path, leaf in tree_flatten_with_path(batch)[0]}


def _name(path: KeyPath) -> str:
    """`labels` of a dictionary; `[0]` of a tuple."""
    if len(path) == 1 and isinstance(path[0], MappingKey):
        return str(path[0].key)
    return keystr(path) or WHOLE


def _shape(leaf: object) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else ()


def _words(leaf: object) -> tuple[int, ...] | str:
    return _shape(leaf) if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _shapes_text(leaves: Mapping[str, tuple[int, ...] | str]) -> str:
    each = (
        f"{name} {list(shape) if isinstance(shape, tuple) else shape}"
        for name, shape in leaves.items()
    )
    return ", ".join(each) or "nothing"
