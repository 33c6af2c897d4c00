"""Interpolation and folding with a symbolic batch: the sizes that real tensors have."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from mist.plans.workload import Attention, Precision
from mist.trace.models.source import TraceSetting
from mist.trace.recording.shim import runs_as

BATCH = 7
MODES = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}
SETTING = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cuda")
Resample = Callable[[torch.Tensor], torch.Tensor]


def sizes_of(resample: Resample, shape: tuple[int, ...]) -> list[torch.Size]:
    x = torch.zeros(shape, requires_grad=True)
    out = resample(x)
    out.sum().backward()
    assert x.grad is not None
    return [out.shape, x.grad.shape]


def check(resample: Resample, shape: tuple[int, ...]) -> None:
    env = ShapeEnv()
    fake = FakeTensorMode(shape_env=env)
    dims = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (len(shape) - 1)]
    context = StatelessSymbolicContext(dynamic_sizes=dims)  # type: ignore[var-annotated]
    x = fake.from_tensor(torch.zeros(shape), symbolic_context=context).requires_grad_()
    with fake, runs_as(SETTING):
        out = resample(x)
        out.sum().backward()
    assert x.grad is not None
    # No guard on the batch: what was found holds for any.
    assert not [guard for guard in env.guards if "Eq" in str(guard.expr)]
    hinted = [tuple(int(size) for size in each.shape) for each in (out, x.grad)]
    assert hinted == [tuple(size) for size in sizes_of(resample, shape)]


@pytest.mark.parametrize("to", [{"scale_factor": 1.7}, {"size": 5}])
@pytest.mark.parametrize(
    ("mode", "num_dims"),
    [*MODES.items(), *((mode, n) for mode in ("nearest", "nearest-exact") for n in (1, 2, 3))],
)
def test_images_of_any_batch_are_resized(mode: str, num_dims: int, to: dict[str, float]) -> None:
    shape = (BATCH, 3, *range(6, 6 + num_dims))
    check(lambda x: F.interpolate(x, mode=mode, **to), shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_images_of_any_batch_are_resized_smoothly(mode: str) -> None:
    check(lambda x: F.interpolate(x, size=(3, 4), mode=mode, antialias=True), (BATCH, 3, 8, 9))


@pytest.mark.parametrize("kernel", [(2, 2), (3, 1)])
def test_images_of_any_batch_are_unfolded_and_folded(kernel: tuple[int, int]) -> None:
    settings = {"stride": 2, "padding": 1, "dilation": (1, 2)}
    check(lambda x: F.unfold(x, kernel, **settings), (BATCH, 3, 8, 9))  # type: ignore[arg-type]
    places = F.unfold(torch.zeros(1, 1, 8, 9), kernel, **settings).shape[-1]  # type: ignore[arg-type]
    rows = 3 * kernel[0] * kernel[1]
    check(
        lambda x: F.fold(x, (8, 9), kernel, **settings),  # type: ignore[arg-type]
        (BATCH, rows, places),
    )
