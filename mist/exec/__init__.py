"""Trains what a plan says, on torch's own parallelism: `mist apply`, and `parallelize` for a loop.

Importing this package needs no torch; its functions load it when they are called.
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict, Unpack

from mist.errors import InputError
from mist.exec.run.launch import run_ranks
from mist.exec.run.preflight import preflight, say_finished, shown_by_torchrun
from mist.exec.run.run_options import RunOptions
from mist.plans.plan import Plan
from mist.rules.apply import refuse_small_host, refuse_unplayable, refuse_world

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from mist.exec.build.adamw import Settings
    from mist.exec.build.parallel import Parallel
    from mist.model.summary import ModelFacts

__all__ = ["RunOptions", "apply", "deferred", "parallelize", "shown_by_torchrun"]


def apply(options: RunOptions, plan: Plan, facts: "ModelFacts") -> None:
    """Train as a plan says: as one rank of torchrun, or by starting a rank for every device.

    `facts`: of the model that the plan names. Raises PlanError and InputError before any rank
    starts, RankFailed when one dies, Stopped when the run was asked to end.
    """
    refuse_unplayable(plan, facts)
    planned = sum(stage.devices[1] for stage in plan.stages)
    is_rank = "RANK" in os.environ  # torchrun or a cluster's launcher has started it
    if is_rank:
        refuse_world(plan, int(os.environ["WORLD_SIZE"]))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", planned))
    refuse_small_host(plan, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), local)
    leads = not is_rank or os.environ["RANK"] == "0"
    checks = preflight(options, plan, leads=leads)
    try:
        if checks.finished:
            if leads:
                say_finished(checks)
        elif is_rank:
            from mist.exec.run.rank_worker import run

            run(checks.options)
        else:
            sys.stderr.flush()
            command = ["-m", "mist.exec.run.rank_worker", checks.options.dump()]
            run_ranks(command, planned, lock_fds=checks.lock_fds)
    finally:
        for handle in checks.lock_fds:
            os.close(handle)


def deferred() -> "AbstractContextManager[None]":
    """Within: models that are built hold no memory for parameters, so any size can be built."""
    from mist.exec.build.empty_weights import deferred as within

    return within()


class ParallelOptions(TypedDict, total=False):
    """Options of `parallelize`, apart from the model and the plan.

    settings: of the optimizer (`mist.exec.build.adamw.Settings`). seed: of weights, where the model
    has no values (7). make_batch, loss: as in a model file.
    """

    settings: "Settings"
    seed: int
    make_batch: "Callable[[int, int], object]"
    loss: Callable[..., object]


def parallelize(model: "nn.Module", plan: Plan, **options: Unpack[ParallelOptions]) -> "Parallel":
    """This rank's part of a model, with optimizer and `train_step(batch)`.

    Call it on every rank, within a default process group of as many ranks as the plan has. The
    model keeps the values of its parameters; built within `deferred()` it has none and gets those
    of the seed. Raises PlanError, InputError and ModelError for what cannot be run.
    """
    import torch
    import torch.distributed as dist

    from mist.exec.build.adamw import Settings
    from mist.exec.build.user_model import subject_of_module

    if not dist.is_initialized():
        raise InputError("parallelize needs a process group: start the script with torchrun.")
    refuse_world(plan, dist.get_world_size())
    make_batch, loss = options.get("make_batch"), options.get("loss")
    subject, facts = subject_of_module(model, plan, make_batch, loss)
    refuse_unplayable(plan, facts)
    from mist.exec.build.parallel import build

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    settings = options.get("settings") or Settings()
    return build(subject, plan, device, settings, options.get("seed", 7))
