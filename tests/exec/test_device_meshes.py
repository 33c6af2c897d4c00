"""Where ranks are on the meshes of a plan."""

from pathlib import Path

import torch

from mist.exec.build.device_meshes import take_place
from mist.exec.dryrun.dry_run import fake_process_group
from tests.exec.layouts import S, Variant, plan_of


def test_ranks_that_share_states_are_neighbours(tmp_path: Path) -> None:
    """dp 8 in 2 copies, tp 2: rank = 8 copy + 2 share + tensor-parallel rank."""
    variant = Variant(name="any", stages=(S(dp=8, dp_replicate=2, tp=2, zero=2),))
    with fake_process_group(5, 16):
        place = take_place(plan_of(variant, tmp_path), torch.device("cpu"))
        assert place.dp_mesh.mesh.tolist() == [[1, 3, 5, 7], [9, 11, 13, 15]]
        assert place.tp_mesh.mesh.tolist() == [4, 5]
        assert (place.i, place.j) == (2, 1)
