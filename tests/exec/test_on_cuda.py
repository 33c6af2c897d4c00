"""What is done on a GPU only, as far as a CPU can show it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mist.exec.build import process_group as group
from mist.exec.build.activations import Offloader
from mist.exec.build.host_copies import Copy, Swapper, register
from mist.exec.build.step_recorder import StepMeasurement, allocated
from mist.exec.run.launch import DEFAULTS
from mist.exec.run.rank_worker import _watch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_memory_is_the_allocators_of_a_step_like_any_other() -> None:
    """On CUDA collectives are counted in the step behind: counting binds a step to the host."""
    assert [_watch(i, 9, CUDA) for i in range(4)] == [None, "memory", "collectives", None]
    assert [_watch(i, 9, CPU) for i in range(4)] == [None, "memory", None, None]
    assert [_watch(i, 0, CUDA) for i in range(1)] == ["memory"]


def test_blocks_that_a_stream_still_reads_are_in_the_peak() -> None:
    found = allocated(
        {
            "active_bytes.all.peak": 7,
            "allocated_bytes.all.peak": 5,
            "reserved_bytes.all.peak": 11,
            "num_alloc_retries": 1,
        }
    )
    assert found == StepMeasurement(
        peak_bytes=7, allocated_bytes=5, reserved_bytes=11, num_alloc_retries=1
    )


def test_segments_expand_unless_the_user_says_otherwise() -> None:
    assert DEFAULTS["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


class Driver:
    """The calls of a CUDA runtime."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        self.held[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.held[address]


def test_memory_is_pinned_as_large_as_it_is_until_it_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    moments = [torch.zeros(1000), torch.zeros(3)]
    for each in moments:
        register(each)
    assert sorted(driver.held.values()) == [12, 4000]
    del each
    moments.pop()
    assert [*driver.held.values()] == [4000]


def test_a_driver_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        assert code == 2
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(2))
    monkeypatch.setattr(torch.cuda, "check_error", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        register(torch.zeros(3))


def test_no_more_than_two_layers_are_on_their_way_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    layer_of: dict[int, int] = {}
    copies: list[Copy] = []

    class Noted(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(f"run {self.number}")
            # Until the computation has waited for a copy the memory behind it is not free.
            held = {layer_of[id(each)] for each in copies if each.source is not None}
            assert held == {layer for layer in range(self.number) if layer >= self.number - 1}
            return x.sin().tanh()  # saves its input and its output

    class Slow(Swapper):
        def to_host(self, tensor: torch.Tensor, into: torch.Tensor | None = None) -> Copy:
            copy = super().to_host(tensor, into)
            copies.append(copy)
            layer_of[id(copy)] = int(order[-1].split()[1])
            return copy

    wait = Copy.wait

    def noted(copy: Copy) -> torch.Tensor:
        if id(copy) in layer_of:
            order.append(f"wait {layer_of[id(copy)]}")
        return wait(copy)

    monkeypatch.setattr(Copy, "wait", noted)
    layers = [Noted(number) for number in range(5)]
    offloader = Offloader(1.0, Slow(CPU))
    for layer in layers:
        offloader.attach(layer)
    x = torch.ones(4, requires_grad=True)
    offloader.start()
    for layer in layers:
        x = layer(x)
    want = ["run 0", "run 1", "wait 0", "run 2", "wait 1", "run 3", "wait 2", "run 4"]
    assert order == want


class _Lost(Exception):
    pass


@pytest.mark.parametrize("abort", [True, False])
def test_a_group_is_aborted_where_peers_may_be_stuck(
    abort: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        group.distributed_c10d, "_abort_process_group", lambda: done.append("abort")
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    with pytest.raises(_Lost), group._destroy_afterwards(abort=abort):
        raise _Lost
    with group._destroy_afterwards(abort=abort):
        pass
    assert done == ["abort" if abort else "destroy", "destroy"]
