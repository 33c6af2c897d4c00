"""Joins the process group of a run, started by `launch`, torchrun or a cluster's launcher."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def joined(timeout_s: float) -> Iterator[torch.device]:
    """Within: the default process group is there; gives this rank's device.

    NCCL where CUDA is, else gloo. A collective that takes longer than `timeout_s` fails.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ours = os.environ.get("MIST_RENDEZVOUS")
    if ours:
        _leave_with_launcher()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=ours or "env://",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _leave_with_launcher() -> None:
    """End this process when the launcher's end of standard input closes: no rank is orphaned."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: this returns at the end
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
