"""Which device a rank uses, and that no other rank uses it."""

import os
import socket
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

from mist.errors import InputError


def rank_device(environment: Mapping[str, str]) -> torch.device:
    """This rank's device: CUDA where there is one, by the launcher's local rank, else the CPU.

    Raises InputError for more ranks than devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(environment["LOCAL_RANK"])
    num_local = int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]))
    ours = "MIST_RENDEZVOUS" in environment
    index = device_index(torch.cuda.device_count(), local_rank, num_local, ours=ours)
    return torch.device("cuda", index)


def device_index(num_devices: int, local_rank: int, num_local: int, *, ours: bool) -> int:
    """Which of the devices that a rank sees is its own. `num_local`: ranks of this machine.

    A cluster's launcher may show each rank its own device only (`srun --gpus-per-task=1`); `ours`
    shows all of them to all ranks. Raises InputError for more ranks than devices.
    """
    if num_local <= num_devices:
        return local_rank
    if num_devices == 1 and not ours:
        return 0
    raise InputError(
        f"{num_local} ranks on this machine, which has {num_devices} CUDA devices: each rank needs "
        f"one of its own. Plan for {num_devices} GPUs, or start ranks on more machines with "
        "torchrun."
    )


def refuse_shared(device: torch.device) -> None:
    """Raise InputError, on every rank, where two ranks were given the same CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    # By UUID: with different CUDA_VISIBLE_DEVICES one index means several devices.
    identity = (socket.gethostname(), str(getattr(properties, "uuid", device.index)))
    identities: list[tuple[str, str]] = [identity] * dist.get_world_size()
    dist.all_gather_object(identities, identity)
    duplicates = [place for place, count in Counter(identities).items() if count > 1]
    if duplicates:
        ranks = [rank for rank, place in enumerate(identities) if place == duplicates[0]]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise InputError(
            f"ranks {ranks} use the same device of {duplicates[0][0]}: each rank needs one of its "
            f"own. Look at CUDA_VISIBLE_DEVICES ({visible} on "
            f"rank {dist.get_rank()}) and at how many tasks the launcher starts on a machine."
        )
