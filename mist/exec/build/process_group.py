"""Joins the process group of a run, started by `launch`, torchrun or a cluster's launcher."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mist.exec.build.devices import rank_device, refuse_shared
from mist.exec.parent_watch import leave_with_parent


@contextmanager
def process_group(timeout_s: float) -> Iterator[torch.device]:
    """Within: the default process group is there; gives this rank's device.

    NCCL where CUDA is, else gloo. A collective that takes longer than `timeout_s` fails. Raises
    InputError when a rank has no device of its own.
    """
    device = rank_device(os.environ)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    ours = os.environ.get("MIST_RENDEZVOUS")
    if ours:
        leave_with_parent(Path(ours.removeprefix("file://")).parent)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=ours or "env://",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
        # NCCL connects the default group here, not in its first collective.
        device_id=device if cuda else None,
    )
    with _destroy_afterwards(abort=cuda):
        if cuda:
            refuse_shared(device)
        yield device


@contextmanager
def _destroy_afterwards(*, abort: bool) -> Iterator[None]:
    """Within: the group is there, afterwards not. `abort`: after an error do not wait for peers."""
    try:
        yield
    except BaseException:
        # destroy_process_group waits for collectives that a dead peer never joins.
        if abort:
            distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def warm_up(groups: Iterable[dist.ProcessGroup], device: torch.device) -> None:
    """One collective on the default group and on each of these, in the same order on every rank.

    NCCL connects a group, and takes its buffers, in its first collective, which all ranks must
    join: here, not amid a pipeline where only some of them send.
    """
    one = torch.ones(1, device=device)
    for group in (dist.group.WORLD, *groups):
        dist.all_reduce(one, group=group)
