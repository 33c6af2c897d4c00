"""Converted models under FSDP2 and tensor parallelism, heads by parts: two ranks, one gradient."""

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mist.layers import VocabularyPart, convert, head_loss
from mist.plans.workload import HeadMode
from tests.layers.families import batch
from tests.layers.test_functions import error, gradients, numbers
from tests.layers.test_surgery import model_of

RANKS = 2
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(**batch(model, 2, 9)).logits
    return out.square().mean()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    styles = {name: ColwiseParallel() for name in COLUMNS}
    styles |= {name: RowwiseParallel() for name in ROWS}  # type: ignore[misc]
    for layer in model.model.layers:  # type: ignore[union-attr]
        plan = {
            n: styles[n.split(".")[-1]]
            for n, _ in layer.named_modules()
            if n.split(".")[-1] in styles
        }
        parallelize_module(layer, mesh, plan)


def same_gradients(level: str, wrap: Callable[[nn.Module, DeviceMesh], None]) -> None:
    """Both ranks run the same batch: their mean, and their parts, are those of one process."""
    plain = model_of("llama")
    loss(plain).backward()
    model = copy.deepcopy(plain)
    model.zero_grad()
    convert(model, level)
    wrap(model, init_device_mesh("cpu", (RANKS,)))
    loss(model).backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        grad, exact = found.grad, expected.grad
        assert grad is not None and exact is not None
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        assert torch.allclose(whole, exact, rtol=1e-4, atol=1e-7), name


def whole_head(level: str) -> None:
    """A head of which each rank has half of the rows."""
    index, words = dist.get_rank(), 30
    x, weight = numbers(11, 6), numbers(words, 6, seed=2)
    ids = torch.arange(11) * 2
    reference = gradients(lambda x, w: F.cross_entropy(F.linear(x, w), ids), [x, weight])
    assert dist.group.WORLD is not None
    rows = slice(index * words // RANKS, (index + 1) * words // RANKS)
    part = VocabularyPart(first=rows.start, group=dist.group.WORLD)
    for mode in HeadMode:
        ours = gradients(
            lambda x, w: head_loss(x, w, ids, mode=mode, part=part, num_chunks=4),  # noqa: B023
            [x, weight[rows]],
        )
        assert error(ours, [*reference[:2], reference[2][rows]]) < 1e-12


SUBJECTS: dict[str, Callable[[str], None]] = {
    "fsdp2": lambda level: same_gradients(level, shard),
    "tp": lambda level: same_gradients(level, divide),
    "head": whole_head,
}


def rank(index: int, store: str, subject: str, level: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=index,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    SUBJECTS[subject](level)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "level"),
    [("fsdp2", "drop-norm"), ("fsdp2", "tempo"), ("tp", "drop-norm"), ("head", "none")],
)
def test_two_ranks_have_the_gradients_of_one(subject: str, level: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path / "store"), subject, level), nprocs=RANKS)
