"""Model files that move what they build: the model stays on the meta device, with its dtypes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mist.trace.models.meta_device import StaysOnMeta


class Net(nn.Module):
    def __init__(self, device: object = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0, device=device))
        self.register_buffer("real", torch.zeros(2, device="cpu"))


MOVES: dict[str, Callable[[], nn.Module]] = {
    "to a device": lambda: Net().to("cuda" if torch.cuda.is_available() else "cpu"),
    "cuda": lambda: Net().cuda(),
    "cpu": lambda: Net().cpu(),
    "to a device by name": lambda: Net().to(device="cuda:0", dtype=torch.float32),
    "like a tensor": lambda: Net().to(torch.zeros(1, device="cpu")),
    "made there": lambda: Net(torch.device("cuda", 0)),
    "to empty": lambda: Net().to_empty(device="cpu"),
}


@pytest.mark.parametrize("how", MOVES)
def test_parameters_stay_on_the_meta_device(how: str) -> None:
    with torch.device("meta"), StaysOnMeta():
        net = MOVES[how]()
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert net.table.device.type == "meta"
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.linear.weight.requires_grad


def test_dtypes_change_and_real_tensors_stay_real() -> None:
    with torch.device("meta"), StaysOnMeta():
        net = Net().to("cuda", torch.bfloat16)
        other = Net().to(torch.float16)
    assert net.linear.weight.dtype == net.table.dtype == torch.bfloat16
    assert other.linear.weight.dtype == torch.float16
    assert other.real.device.type == "cpu"
    assert torch.ones(2).to("cpu").device.type == "cpu"
