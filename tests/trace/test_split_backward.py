"""What a split backward pass keeps, against torch's own split on real tensors."""

from itertools import chain

import pytest
import torch
from torch.distributed.pipelining._backward import (
    stage_backward_input,
    stage_backward_weight,
)

from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting
from mist.trace.recording.split_backward import Awaited
from tests.trace.real import layer_inputs
from tests.trace.test_exact import (
    INPUTS,
    PATHS,
    Family,
    bert,
    family_graph,
    gpt2,
    llama,
    plain,
    saved_bytes,
    token_ids,
)

POINTS = [(2, 48), (3, 77)]


def waiting_bytes(module: torch.nn.Module, output: torch.Tensor, given: torch.Tensor) -> int:
    """Bytes of the gradients that torch holds between the halves of a backward pass."""
    weights = list(module.parameters())
    _, groups = stage_backward_input([output], [torch.ones_like(output)], [given], iter(weights))
    rows = chain.from_iterable(chain.from_iterable(group["grads"]) for group in groups)
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in rows if t is not None
    }
    stage_backward_weight(iter(weights), groups)
    assert all(weight.grad is not None for weight in weights)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param(
            family,
            Precision.FP32,
            id=family.__name__,
            marks=[] if family is llama else [pytest.mark.slow],
        )
        for family in (llama, gpt2, bert, plain)
    ],
)
def test_gradients_that_wait_equal_real_ones(family: Family, precision: Precision) -> None:
    setting = TraceSetting(precision=precision, attention=Attention.FLASH, policy="cpu")
    (block,) = family_graph(family, torch.float32, setting).blocks
    model = family(torch.float32, "cpu")
    layer = model.get_submodule(PATHS[family])
    for b, s in POINTS:
        (first, *rest), kwargs = layer_inputs(model, layer, INPUTS.get(family, token_ids)(b, s))
        given = first.detach().requires_grad_()
        out = layer(given, *rest, **kwargs)
        output = out[0] if isinstance(out, tuple) else out
        found = waiting_bytes(layer, output, given)
        assert saved_bytes(block.awaited, b, s) == found, (b, s)


def test_what_is_made_of_parameters_alone_is_one() -> None:
    """A cast of a weight, as autocast makes it, meets an activation in the product behind it."""
    awaited = Awaited()
    weight = torch.ones(2, 2, requires_grad=True)
    cast, x = weight.to(torch.bfloat16), torch.ones(2, 2, requires_grad=True).bfloat16()
    assert awaited.read([weight], [weight.untyped_storage()._cdata], [cast]) is None
    out = x @ cast
    assert awaited.read([x, cast], [], [out]) is out
