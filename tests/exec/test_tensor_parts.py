"""Matrices side by side in one parameter: each rank has its part of each, in one range."""

import pytest
import torch

from mist.exec.build.tensor_parts import SideBySide


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("widths", [(8, 8), (16, 8, 8), (4, 12)])
def test_a_rank_has_a_part_of_each_matrix(
    widths: tuple[int, ...], dim: int, num_ranks: int
) -> None:
    matrices = SideBySide(widths=widths, dim=dim, num_ranks=num_ranks)
    whole = torch.randn(sum(widths), sum(widths))
    held = whole.index_select(whole.dim() + dim, matrices.order(whole.device))
    for rank, part in enumerate(held.chunk(num_ranks, dim)):
        own = [matrix.chunk(num_ranks, dim)[rank] for matrix in whole.split(widths, dim)]
        assert torch.equal(part, torch.cat(own, dim))
    assert torch.equal(matrices.restored(held), whole)
