"""What a step trains on: the same samples in the same order under every layout.

Without a file, token ids are drawn from a generator seeded by the seed and the step. A file gives
tokens: `.npy` an array of integers, anything else the bytes of a text (256 ids, no tokenizer).
Step n takes the samples that follow those of step n - 1, from the start again at the end of the
file. A model with `make_batch` makes its own batch, seeded in the same way.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from mist.errors import InputError
from mist.exec.build.rank_grid import RankGrid
from mist.exec.build.weight_init import seed_of
from mist.plans.workload import Workload
from mist.trace.models.image_inputs import placed
from mist.trace.models.loader import LoadedModel
from mist.trace.models.model_inputs import TOKENS

LOOKED_AT: Final = 2**20  # bytes of a file that show whether it is a text


class Batches:
    """The batches of a run. Raises InputError when a file and a model do not fit."""

    def __init__(
        self, loaded: LoadedModel, workload: Workload, seed: int, file: Path | None = None
    ) -> None:
        self._loaded = loaded
        self._workload = workload
        self._seed = seed
        self._begin = (0, 0)  # a step, and the tokens that were read before it
        self._vocab_size = vocabulary(loaded)
        self._tokens = None if file is None else read_tokens(file, loaded, workload)
        if self._tokens is not None:
            for token in (int(self._tokens.max()), int(self._tokens.min())):
                if not 0 <= token < self._vocab_size:
                    raise InputError(
                        f"{file} has token {token}, but the vocabulary of {loaded.name} has "
                        f"{self._vocab_size}."
                    )

    def go_on(self, step: int, tokens: int) -> None:
        """Take up a file where another run left it: after `tokens`, which it read in `step`s."""
        self._begin = (step, tokens)

    def position(self, step: int) -> int:
        """Tokens that are read before a step (from 0)."""
        first, tokens = self._begin
        return tokens + (step - first) * self._workload.tokens_per_step

    def step(self, number: int) -> object:
        """All samples of a step (from 0), on the CPU."""
        size, seq_len = self._workload.global_batch, self._workload.seq_len
        # The state of the generator is restored: dropout must not depend on how batches are made.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self._seed, "data", number))
            batch = self._loaded.batch(size, seq_len)
            if self._loaded.make_batch is not None:
                return batch
            ids = self._ids(number, size, seq_len)
            batch = tree_map(_drawn, batch)
        if self._loaded.images and isinstance(batch, dict):
            return placed(self._loaded.module, batch, ids, self._loaded.images)
        return tree_map(lambda leaf: ids if leaf.shape == ids.shape else leaf, batch)

    def _ids(self, number: int, size: int, seq_len: int) -> torch.Tensor:
        if self._tokens is None:
            return torch.randint(0, self._vocab_size, (size, seq_len))
        first = self.position(number)
        places = np.arange(first, first + size * seq_len) % len(self._tokens)
        ids = self._tokens[places].astype(np.int64)
        return torch.from_numpy(ids).view(size, seq_len)


def _drawn(leaf: object) -> object:
    """Images and sounds with values: every process must have the same."""
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return torch.randn(leaf.shape, dtype=leaf.dtype)
    return leaf


def vocabulary(loaded: LoadedModel) -> int:
    """The number of token ids: the model's own figure, else the rows of its first embedding."""
    config = getattr(loaded.module, "config", None)
    for owner in (loaded.module, config):
        if isinstance(size := getattr(owner, "vocab_size", None), int):
            return size
    tables = (m for m in loaded.module.modules() if isinstance(m, torch.nn.Embedding))
    table = next(tables, None)
    if table is None and loaded.make_batch is None:
        raise InputError(f"{loaded.name} has no embedding: give its file make_batch(batch, seq).")
    return table.num_embeddings if table is not None else 0


def read_tokens(file: Path, loaded: LoadedModel, workload: Workload) -> np.ndarray[Any, Any]:
    """The tokens of a file. Raises InputError."""
    if loaded.images:
        raise InputError(
            f"--data {file}: {loaded.name} is trained with images. Plan it with --images 0, or "
            "train in a loop of your own (mist.exec)."
        )
    if loaded.make_batch is not None or getattr(loaded.module, "main_input_name", TOKENS) != TOKENS:
        raise InputError(f"--data {file}: {loaded.name} does not take token ids.")
    try:
        if file.suffix == ".npy":
            tokens: np.ndarray[Any, Any] = np.load(file, mmap_mode="r").reshape(-1)
        else:
            tokens = np.fromfile(file, dtype=np.uint8)
            if not tokens[:LOOKED_AT].all():
                raise InputError(
                    f"--data {file} holds zero bytes, so it is no text, and its bytes are no "
                    "tokens. Save token ids as an array of integers (.npy)."
                )
    except (OSError, ValueError) as error:
        raise InputError(f"--data {file} cannot be read: {error}.") from error
    if not np.issubdtype(tokens.dtype, np.integer) or len(tokens) < workload.seq_len:
        raise InputError(
            f"--data {file} holds {len(tokens)} values of type {tokens.dtype}; a sample needs "
            f"{workload.seq_len} integer tokens."
        )
    return tokens


def rank_rows(batch: object, grid: RankGrid, i: int, num_micro_batches: int) -> object:
    """The samples of data-parallel rank i, micro-batch by micro-batch.

    A tensor may have several rows for each sample (of its images), those of a sample together.
    """
    size = grid.rows // grid.dp
    rows = torch.cat(
        # A micro-batch is a run of consecutive samples: stages with another dp divide the same one.
        [torch.arange(size) + m * grid.rows + i * size for m in range(num_micro_batches)]
    )
    num_samples = grid.rows * num_micro_batches
    return tree_map(lambda leaf: _by_sample(leaf, num_samples)[rows].flatten(0, 1), batch)


def micro_batch(batch: object, size: int, index: int, num_samples: int) -> object:
    """One micro-batch of `size` of the `num_samples` samples of a rank."""
    picked = slice(index * size, (index + 1) * size)
    return tree_map(lambda leaf: _by_sample(leaf, num_samples)[picked].flatten(0, 1), batch)


def _by_sample(leaf: torch.Tensor, num_samples: int) -> torch.Tensor:
    """[samples, rows of each, ...]."""
    samples: torch.Tensor = leaf.unflatten(0, (num_samples, leaf.shape[0] // num_samples))
    return samples


def to_device(batch: object, device: torch.device) -> object:
    """A batch on the device."""
    # By identity: a tensor that a batch has under two names (ids that are labels, too) is copied
    # once.
    copies = {id(leaf): leaf.to(device, non_blocking=True) for leaf in tree_leaves(batch)}
    return tree_map(lambda leaf: copies[id(leaf)], batch)
