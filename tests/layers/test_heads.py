"""Loss heads against torch's cross-entropy in float64, whole and by parts of the vocabulary."""

import threading
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mist.errors import InputError
from mist.layers import VocabularyPart, head_loss
from mist.plans.workload import HeadMode
from tests.layers.test_functions import FP32_CLOSE, error, gradients, numbers

ROWS, WIDTH, WORDS = 37, 12, 90
MODES = tuple(HeadMode)


def targets() -> Tensor:
    ids = torch.randint(0, WORDS, (ROWS,), generator=torch.Generator().manual_seed(1))
    ids[::5] = -100
    return ids


def arguments(size: float = 1.0) -> list[Tensor]:
    return [numbers(ROWS, WIDTH, scale=size), numbers(WORDS, WIDTH, seed=2)]


def plain(x: Tensor, weight: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(F.linear(x, weight).double(), targets(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_chunks", [37, 16, 3, 1])
@pytest.mark.parametrize("mode", MODES)
def test_heads_against_float64(
    mode: HeadMode, num_chunks: int, reduction: Literal["mean", "sum"]
) -> None:
    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return head_loss(
            x, weight, targets(), mode=mode, num_chunks=num_chunks, reduction=reduction
        )

    for size in (1.0, 30.0):
        single = [each.float() for each in arguments(size)]
        reference = gradients(
            lambda x, w: plain(x, w, reduction), [each.double() for each in single]
        )
        assert error(gradients(ours, single), reference) < FP32_CLOSE


@pytest.mark.parametrize("mode", MODES)
def test_heads_by_finite_differences(mode: HeadMode) -> None:
    leaves = [each[:8, :3].clone().requires_grad_() for each in arguments()]
    ids = (targets() % 8)[:8]
    assert torch.autograd.gradcheck(
        lambda x, w: head_loss(x, w, ids, mode=mode, num_chunks=3), leaves
    )


@pytest.mark.parametrize("mode", MODES)
def test_heads_in_bf16(mode: HeadMode) -> None:
    low = [each.bfloat16() for each in arguments()]
    eager = lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets())  # noqa: E731
    reference = gradients(plain, [each.double() for each in low])
    ours = gradients(lambda x, w: head_loss(x, w, targets(), mode=mode, num_chunks=3), low)
    for found, other, exact in zip(ours, gradients(eager, low), reference, strict=True):
        assert error([found], [exact]) <= 1.1 * error([other], [exact])


def test_nothing_to_learn_is_a_loss_of_zero() -> None:
    none = torch.full((ROWS,), -100)
    for mode in MODES:
        found = gradients(
            lambda x, w: head_loss(x, w, none, mode=mode),  # noqa: B023 # type: ignore[arg-type]
            arguments(),
        )
        assert all(not each.any() for each in found)


class Threads:
    """The sums over ranks, with threads for ranks: each waits until all have added."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.values: list[Tensor] = []

    def join(self, x: Tensor, combine: Callable[[Tensor], Tensor]) -> None:
        self.values.append(x.clone())
        self.barrier.wait()
        total = combine(torch.stack(self.values))
        self.barrier.wait()
        x.copy_(total)
        self.values.clear()
        self.barrier.wait()


class Part(VocabularyPart):
    """A part whose group is threads."""

    def sum(self, x: Tensor) -> None:
        self.group.join(x, lambda rows: rows.sum(0))  # type: ignore[attr-defined]

    def max(self, x: Tensor) -> None:
        self.group.join(x, lambda rows: rows.amax(0))  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_the_vocabulary_together_are_the_whole(mode: HeadMode) -> None:
    reference = gradients(plain, arguments())
    ranks, group = 3, Threads(3)
    results: dict[int, list[Tensor]] = {}
    size = WORDS // ranks

    def rank(index: int) -> None:
        part = Part(first=index * size, group=group)  # type: ignore[arg-type]
        x, weight = arguments()
        results[index] = gradients(
            lambda x, w: head_loss(x, w, targets(), mode=mode, part=part, num_chunks=3),
            [x, weight[index * size : (index + 1) * size]],
        )

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == ranks
    for loss, dx, _ in results.values():
        assert error([loss, dx], reference[:2]) < 1e-12
    dweight = torch.cat([results[index][2] for index in range(ranks)])
    assert error([dweight], reference[2:]) < 1e-12


def test_bad_heads_are_refused() -> None:
    x, weight = arguments()
    with pytest.raises(InputError) as refused:
        head_loss(x, weight, targets(), mode="lazy")
    assert str(refused.value) == ("head 'lazy' is unknown. Known: none, checkpointed, in-forward.")
    with pytest.raises(InputError) as refused:
        head_loss(x, weight, targets()[:3], mode="none")
    assert str(refused.value) == (
        "head: x [37, 12], weight [90, 12] and target [3] do not fit. "
        "Expected [..., h], [V, h] and [...]."
    )
