"""Checkpoints that a run under another plan can go on from.

Every parameter and moment is saved under the model's own name as a distributed tensor (torch's
distributed checkpoint, which knows which rank holds which part), so the layout does not matter. A
checkpoint is written into a hidden folder and renamed when it is complete: what was there before
stays whole, whatever happens meanwhile. The last NUM_KEPT of them stay. Buffers that a
model saves with its weights are saved too: they may have come with them.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.tensor import DTensor

from mist.errors import CheckpointError, InputError, MistError, OutputError
from mist.exec.build.initial_weights import bounds_of
from mist.exec.build.parallel import Parallel
from mist.exec.build.tensor_parts import fill_part, in_model_order, read_within
from mist.exec.run.checkpoint_folder import FACTS, Checkpoint, checkpoints
from mist.exec.run.tensor_reader import TensorReader
from mist.files import write_text

NUM_KEPT: Final = 2
BUFFER: Final = "buffer."


def save(parallel: Parallel, folder: Path, facts: Mapping[str, object]) -> Path:
    """Write a checkpoint of the steps done so far; all ranks call it. Returns its folder.

    Raises CheckpointError where it cannot be written; those before it stay whole.
    """
    number = parallel.optimizer.num_steps
    complete, partial = folder / f"step-{number}", folder / f".step-{number}.partial"
    with _removed_where_it_fails(complete, partial):
        if dist.get_rank() == 0:
            for leftover in folder.glob(".step-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            # Not by step: a run that goes on from an earlier step writes lower numbers later.
            order = max((each.order[0] for each in checkpoints(folder)), default=0) + 1
            write_text(partial / FACTS, json.dumps({**facts, "step": number, "order": order}))
        dist.barrier()
        with _without_noise():
            write(_state(parallel), checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        _remove(complete)
        # A rename is atomic: the checkpoint is there whole or not at all.
        partial.rename(complete)
        _flush(folder)
        for old in checkpoints(folder)[:-NUM_KEPT]:
            _remove(old.path)
    dist.barrier()
    return complete


@contextmanager
def _removed_where_it_fails(complete: Path, partial: Path) -> Iterator[None]:
    """Within: what is raised leaves no half, which would keep a full disk full."""
    try:
        yield
    except (OSError, OutputError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{complete} cannot be written: {_reason(error)}. The checkpoints before it are whole. "
            "Make room, then go on from the last one with --resume."
        ) from error


def _reason(error: BaseException) -> str:
    """Why a checkpoint could not be written, of what torch made of it."""
    if isinstance(error, CheckpointException):
        # torch gathers what each rank raised; the first of them stands for all.
        return _reason(next(first for first, _ in error.failures.values()))
    words = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return error.strerror or words
    # Its writer of zip files does not keep what the system said.
    return f"a file broke off, as on a full disk ({words})"


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is none as soon as its name is gone: a death leaves no half."""
    if checkpoint.exists():
        half = checkpoint.with_name(f".{checkpoint.name}.old.partial")
        checkpoint.rename(half)
        shutil.rmtree(half, ignore_errors=True)


def resume(parallel: Parallel, last: Checkpoint) -> int:
    """Go on from a checkpoint; the number of steps done. Raises InputError where it is damaged."""
    try:
        state = _read(parallel, last)
    except MistError:
        raise
    except (Exception, CheckpointException) as error:  # whatever zip files and pickles raise
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        raise InputError(
            f"{last.path} cannot be read ({type(error).__name__}: {reason}). Remove it to go on "
            "from the checkpoint before it."
        ) from error
    _fill_parts(parallel, state)
    parallel.optimizer.num_steps = last.step
    return last.step


def _read(parallel: Parallel, last: Checkpoint) -> dict[str, torch.Tensor]:
    with _without_noise():
        reader = TensorReader(last.path)
        known = reader.read_metadata().state_dict_metadata
        # Earlier versions saved no buffers; everything else must be there.
        state = {
            name: value
            for name, value in _state(parallel).items()
            if name in known or not name.startswith(BUFFER)
        }
        load(state, storage_reader=reader)
    return state


def _state(parallel: Parallel) -> dict[str, torch.Tensor]:
    """All that is saved, each under its name; loading fills the same tensors."""
    state = _states(parallel)
    for name in _reordered(parallel, state):
        value = state[name]
        assert isinstance(value, DTensor)
        state[name] = in_model_order(value, parallel.side_by_side[_parameter_name(name)])
    for chunk in parallel.chunks:
        state.update({f"{BUFFER}{n}": value for n, value in saved_buffers(chunk.root.model)})
    return state


def _states(parallel: Parallel) -> dict[str, torch.Tensor]:
    """Parameters and moments as this rank holds them."""
    values = {name: parameter.detach() for name, parameter in parallel.parameters.items()}
    state = {f"model.{name}": value for name, value in values.items()}
    for slot in parallel.optimizer.slots:
        value = values[slot.name]
        state[f"first.{slot.name}"] = _like(value, slot.first)
        state[f"second.{slot.name}"] = _like(value, slot.second)
    return state


def _reordered(parallel: Parallel, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors whose rows are not in the model's order."""
    return [name for name in state if _parameter_name(name) in parallel.side_by_side]


def _parameter_name(name: str) -> str:
    """The parameter's name of a name in the state."""
    return name.partition(".")[2]


def _fill_parts(parallel: Parallel, loaded: Mapping[str, torch.Tensor]) -> None:
    """Fill this rank's parts from tensors that were loaded in the model's own form."""
    states = _states(parallel)
    for name in _reordered(parallel, states):
        target = states[name]
        assert isinstance(target, DTensor)
        matrices = parallel.side_by_side[_parameter_name(name)]
        whole, bounds = loaded[name], bounds_of(target)
        if isinstance(whole, DTensor):
            read = whole.to_local()
        else:
            read = whole[read_within(target, bounds, matrices)]
        fill_part(target, read, bounds, matrices)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a model saves with its weights, by name."""
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, value


def _like(value: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A moment as a distributed tensor laid out as its parameter; memory is shared."""
    if not isinstance(value, DTensor):
        return moment
    return DTensor(moment, value._spec, requires_grad=False)


def _flush(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _without_noise() -> warnings.catch_warnings:
    """Within: torch does not warn of its own deprecated calls."""
    return warnings.catch_warnings(action="ignore")
