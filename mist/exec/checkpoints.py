"""Checkpoints that a run under another plan can go on from.

Every parameter and moment is saved under the model's own name as a distributed tensor (torch's
distributed checkpoint, which knows which rank holds which part), so the layout does not matter. A
checkpoint is written into a hidden folder and renamed when it is complete: what was there before
stays whole, whatever happens meanwhile. The last KEPT ones stay.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.tensor import DTensor

from mist.errors import InputError
from mist.exec.parallel import Parallel
from mist.files import write_text

KEPT: Final = 2
NAME: Final = re.compile(r"step-(\d+)")
FACTS: Final = "mist.json"


def save(parallel: Parallel, folder: Path, facts: dict[str, object]) -> Path:
    """Write a checkpoint of the steps done so far; all ranks call it. Returns its folder."""
    number = parallel.optimizer.num_steps
    complete, partial = folder / f"step-{number}", folder / f".step-{number}.partial"
    if dist.get_rank() == 0:
        for left in folder.glob(".step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(partial / FACTS, json.dumps({**facts, "step": number}))
    dist.barrier()
    with _without_noise():
        write(_state(parallel), checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(complete, ignore_errors=True)
        partial.rename(complete)
        _flush(folder)
        for old in _checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return complete


def resume(parallel: Parallel, folder: Path, facts: dict[str, object]) -> int:
    """Go on from the last checkpoint in a folder; the number of steps done, 0 without one.

    Raises InputError when it is of another model or was started with another seed.
    """
    found = _checkpoints(folder)
    if not found:
        return 0
    known = json.loads((found[-1] / FACTS).read_text())
    for name, value in facts.items():
        if known.get(name) != value:
            raise InputError(
                f"{found[-1]} was made with {name} {known.get(name)}, this run has {value}. "
                "Give another --checkpoint folder, or the same model and seed."
            )
    with _without_noise():
        load(_state(parallel), checkpoint_id=found[-1])
    parallel.optimizer.num_steps = int(known["step"])
    return parallel.optimizer.num_steps


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {int(m[1]): path for path in folder.glob("step-*") if (m := NAME.fullmatch(path.name))}
    return [found[number] for number in sorted(found)]


def _state(parallel: Parallel) -> dict[str, torch.Tensor]:
    """All that is saved, each under its name; loading fills the same tensors."""
    values = {name: parameter.detach() for name, parameter in parallel.parameters.items()}
    state = {f"model.{name}": value for name, value in values.items()}
    for slot in parallel.optimizer.slots:
        value = values[slot.name]
        state[f"first.{slot.name}"] = _like(value, slot.first)
        state[f"second.{slot.name}"] = _like(value, slot.second)
    return state


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
