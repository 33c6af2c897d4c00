"""Losses and optimizers of other frameworks on real tensors: the bytes that profiles state."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mist.platform.profiles import load_runtime
from tests.trace.real import Watch

TOKENS, WIDTH, VOCABULARY = 64, 8, 4096
LOGITS = TOKENS * VOCABULARY


def bytes_per_logit(*, keep: bool) -> tuple[float, float, float]:
    """Of a head in bf16 with torch's loss: kept to the backward pass, the most alive in each pass.

    `keep`: the caller holds the logits meanwhile.
    """
    matrix = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    known = {each.untyped_storage()._cdata for each in (matrix.weight, labels, hidden)}
    forward = Watch([], known)
    with forward:
        logits = [matrix(hidden)]
        loss = cross_entropy(logits[0].float(), labels)
    if not keep:
        logits.clear()
    kept = forward.alive(set())
    alive = [(ref, size) for ref, size, _ in forward.refs if not ref.expired()]
    backward = Watch(alive, known)
    with backward:
        loss.backward()
    peaks = forward.peak(set()), backward.peak(set())
    return kept / LOGITS, peaks[0] / LOGITS, peaks[1] / LOGITS


def test_torchs_loss_on_fp32_logits() -> None:
    """Forward: 2 + 4 + 4 bytes. Backward: log-softmax, and the gradients of both its halves."""
    # Beside these: 8 bytes of loss and total weight, in all.
    assert bytes_per_logit(keep=False) == pytest.approx((4, 10, 12), rel=1e-4)
    assert bytes_per_logit(keep=True) == pytest.approx((6, 10, 14), rel=1e-4)


@pytest.mark.parametrize("name", ["torchtitan", "fsdp1", "deepspeed-zero3"])
def test_profiles_with_torchs_loss_state_what_was_counted(name: str) -> None:
    loss = load_runtime(name).profile.loss
    assert loss is not None
    kept, *peaks = bytes_per_logit(keep=False)
    assert loss.kept_bytes_per_logit.value == pytest.approx(kept, rel=1e-4)
    assert loss.peak_bytes_per_logit.value == pytest.approx(max(peaks), rel=1e-4)


@pytest.mark.parametrize(("fused", "name"), [(False, "fsdp1"), (True, "torchtitan")])
def test_what_a_step_of_adamw_makes(fused: bool, name: str) -> None:
    """Without a fused kernel: the root of the second moments of all parameters, 4 bytes each."""
    num_params, made = 3 * 1000, load_runtime(name).profile.transients.optimizer_bytes_per_param
    parameters = [nn.Parameter(torch.randn(1000)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters, foreach=not fused, fused=fused)
    for _ in range(2):  # the first step makes the moments
        for parameter in parameters:
            parameter.grad = torch.randn(1000)
        watch = Watch([], storages(optimizer))
        with watch, torch.no_grad():
            optimizer.step()
    assert watch.peak(set()) / num_params == pytest.approx(made.value, abs=0.05)


def storages(optimizer: torch.optim.Optimizer) -> set[int]:
    """Parameters, gradients and states: what is there before a step and after."""
    rows = [value for state in optimizer.state.values() for value in state.values()]
    for group in optimizer.param_groups:
        rows += [tensor for each in group["params"] for tensor in (each, each.grad)]
    return {tensor.untyped_storage()._cdata for tensor in rows}
