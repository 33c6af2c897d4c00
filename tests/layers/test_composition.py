"""Converted models under FSDP2 on two ranks: the gradients of one process."""

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mist.layers import convert
from tests.layers.families import batch
from tests.layers.test_surgery import model_of

RANKS = 2


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(**batch(model, 2, 9)).logits
    return out.square().mean()


def rank(index: int, store: str, level: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=index,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    plain = model_of("llama")
    loss(plain).backward()
    model = copy.deepcopy(plain)
    model.zero_grad()
    convert(model, level)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss(model).backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(found.grad, DTensor), name
        # Both ranks run the same batch: their mean is that of one.
        assert torch.allclose(found.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-7), name  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["drop-norm", "tempo"])
def test_converted_layers_run_under_fsdp2(level: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path / "store"), level), nprocs=RANKS)
