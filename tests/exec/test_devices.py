"""Devices of ranks, without one: which is chosen, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mist.errors import InputError
from mist.exec.build import devices
from mist.exec.build.devices import device_index, rank_device, refuse_shared


@pytest.mark.parametrize(
    ("num_devices", "local_rank", "num_local", "ours", "want"),
    [
        (8, 3, 8, True, 3),
        (8, 1, 2, True, 1),
        (1, 0, 1, True, 0),
        (1, 5, 8, False, 0),  # srun --gpus-per-task=1: a rank sees its own device only
        (4, 3, 4, False, 3),
    ],
)
def test_a_rank_has_a_device_of_its_own(
    num_devices: int, local_rank: int, num_local: int, ours: bool, want: int
) -> None:
    assert device_index(num_devices, local_rank, num_local, ours=ours) == want


@pytest.mark.parametrize(("num_devices", "num_local", "ours"), [(1, 2, True), (2, 4, False)])
def test_more_ranks_than_devices_are_refused(num_devices: int, num_local: int, ours: bool) -> None:
    with pytest.raises(InputError, match=f"{num_local} ranks on this machine, which has"):
        device_index(num_devices, 0, num_local, ours=ours)


def test_the_launcher_says_which_rank_of_a_machine_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    by_torchrun = {"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}
    assert rank_device(by_torchrun) == torch.device("cuda", 5)
    with pytest.raises(InputError, match="16 ranks on this machine"):
        rank_device({"LOCAL_RANK": "5", "WORLD_SIZE": "16", "MIST_RENDEZVOUS": "file://x"})


def test_without_cuda_it_is_the_cpu() -> None:
    assert rank_device({}) == torch.device("cpu")


@pytest.mark.parametrize(("uuids", "refused"), [(["a", "b"], False), (["a", "a"], True)])
def test_a_device_of_two_ranks_is_refused(
    uuids: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(every: list[tuple[str, str]], mine: tuple[str, str]) -> None:
        every[:] = [(mine[0], uuid) for uuid in uuids]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    found = SimpleNamespace(uuid="a")
    monkeypatch.setattr(devices.torch.cuda, "get_device_properties", lambda device: found)
    if not refused:
        refuse_shared(torch.device("cuda", 0))
        return
    with pytest.raises(InputError, match=r"ranks \[0, 1\] use the same device"):
        refuse_shared(torch.device("cuda", 0))
