"""What is known of values that a trace does not have: checks pass, and masks of what is valid."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mist.plans.workload import Attention, Precision
from mist.trace.diagnose import DATA_DEPENDENT
from mist.trace.models.source import TraceSetting
from mist.trace.recording.shim import runs_as

SETTING = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cuda")
WORDS = 10


def raises_if(x: Tensor) -> Tensor:
    if x is not None and x.max() >= WORDS:
        raise ValueError("too large")
    return x


def raises_unless(x: Tensor) -> Tensor:
    if not (x >= 0).all() or (x == 3).any():
        raise ValueError
    if not torch.isfinite(x).all():
        message = "not finite"
        raise ValueError(message)
    return x


def asserts(x: Tensor) -> Tensor:
    assert x.min() >= 0 and x.max() < WORDS, "of range"
    assert not (x == 3).any().item()
    return x


def raises_otherwise(x: Tensor) -> Tensor:
    if bool((x < WORDS).all()):
        x = x + 1
    else:
        raise ValueError
    return x


def warns(x: Tensor) -> Tensor:
    if (x == 3).any():
        warnings.warn("padding", stacklevel=2)
    return x


def distribution(x: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=x.float()).entropy()


def fake(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, runs_as(SETTING):
        return run(mode.from_tensor(x, static_shapes=True))


@pytest.mark.parametrize(
    "run", [raises_if, raises_unless, asserts, raises_otherwise, warns, distribution]
)
def test_checks_pass_as_they_do_on_valid_numbers(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([[1, 2], [4, 5]])
    assert fake(run, x).shape == run(x).shape


def branches(x: Tensor) -> Tensor:
    if (x == 3).any():
        return x[:1]
    return x


def loops(x: Tensor) -> Tensor:
    if not (x >= 0).all():
        raise ValueError
    while (x == 3).any():
        x = x + 1
    return x


@pytest.mark.parametrize("run", [branches, loops])
def test_other_branches_are_still_refused(run: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(DATA_DEPENDENT):
        fake(run, torch.ones(2, 2, dtype=torch.int64))


def valid_labels(x: Tensor) -> Tensor:
    return x.masked_select((x != -100) & (x != 0))


def rows_of_labels(x: Tensor) -> Tensor:
    keep = x != -100
    return F.one_hot(x, WORDS)[keep] * x[keep][:, None]


def rows_of_ones(x: Tensor) -> Tensor:
    return x[torch.ones(x.shape[:1], dtype=torch.bool)]


@pytest.mark.parametrize("run", [valid_labels, rows_of_labels, rows_of_ones])
def test_what_is_valid_is_everything(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([[1, 2], [4, 5]])
    assert fake(run, x).shape == run(x).shape


def of_an_expert(x: Tensor) -> Tensor:
    return torch.arange(4).view(2, 2)[x != 1]


def of_the_past(x: Tensor) -> Tensor:
    positions = torch.arange(2)
    return x[(positions[:, None] - positions).view(2, 2) >= 0]


@pytest.mark.parametrize("run", [of_an_expert, of_the_past])
def test_what_something_else_selects_is_not_known(run: Callable[[Tensor], Tensor]) -> None:
    """Rows of an expert, say: those are found by the module's own attributes, or refused."""
    assert not isinstance(fake(run, torch.ones(2, 2, dtype=torch.int64)).shape[0], int)


def rows_by_number(x: Tensor) -> Tensor:
    return x[torch.ones(3, 4, dtype=torch.int64)]


def test_ones_that_are_numbers_of_rows_select_no_mask() -> None:
    x = torch.tensor([[1, 2], [4, 5]])
    assert fake(rows_by_number, x).shape == rows_by_number(x).shape


def losses(x: Tensor) -> Tensor:
    steps, batch = 12, x.shape[0]
    probabilities = torch.zeros(steps, batch, WORDS, requires_grad=True).log_softmax(-1)
    sizes = torch.full((batch,), steps), torch.full((batch,), x.shape[1])
    loss: Tensor = F.ctc_loss(probabilities, valid_labels(x), *sizes, reduction="none")
    return torch.autograd.grad(loss.sum(), probabilities)[0][:, :, 0] + loss


def test_ctc_has_the_shapes_of_real_tensors() -> None:
    x = torch.tensor([[1, 2], [4, 5]])
    assert fake(losses, x).shape == losses(x).shape
