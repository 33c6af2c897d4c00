"""Norms of which ranks have a part of each row: the whole norm's results and gradients."""

from tests.exec.forking import Forked


def test_ranks_share_the_means_of_norms(forked: Forked) -> None:
    assert forked("tests.exec.norm_rank", num_ranks=2).split() == ["equal"]
