"""Device meshes and process groups of a plan. Every rank builds all of them, in the same order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mist.exec.build.rank_grid import RankGrid, grid_of, stage_of, uniform
from mist.plans.plan import Plan

DATA: Final = {False: ("dp",), True: ("dp_replicate", "dp_shard")}
"""Mesh axes of data parallelism, without and with copies of the states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where a rank is: its stage, indices, meshes, and the group that its pipeline counts ranks in.

    `dp_mesh`: of the data-parallel ranks, two-dimensional (replicate, shard) where the states have
    copies. `column`: the ranks of all stages at the same indices (this rank alone where stages
    differ).
    """

    rank: int
    stage: int
    i: int
    j: int
    grids: tuple[RankGrid, ...]
    dp_mesh: DeviceMesh
    tp_mesh: DeviceMesh
    column: dist.ProcessGroup
    device: torch.device

    @property
    def grid(self) -> RankGrid:
        """The grid of this rank's stage."""
        return self.grids[self.stage]


def take_place(plan: Plan, device: torch.device) -> RankPlace:
    """Build every mesh and group of the plan; the default process group must be there."""
    rank = dist.get_rank()
    grids = tuple(grid_of(plan, stage) for stage in plan.stages)
    meshes = [_mesh(grid, device) for grid in grids]
    stage = stage_of(plan, rank)
    i, j = divmod(rank - grids[stage].first_rank, grids[stage].tp)
    # Where stages differ in ranks, torch's stage gets a group of this rank alone: our transfers
    # name ranks of the default group themselves.
    columns = [[r] for r in range(dist.get_world_size())]
    if uniform(plan):
        columns = [[grid.rank(*at) for grid in grids] for at in grids[0].places()]
    return RankPlace(
        rank=rank,
        stage=stage,
        i=i,
        j=j,
        grids=grids,
        dp_mesh=meshes[stage][DATA[grids[stage].dp_replicate > 1]],
        tp_mesh=meshes[stage]["tp"],
        column=new_groups(columns)[rank],
        device=device,
    )


def new_groups(members: Sequence[Sequence[int]]) -> Mapping[int, dist.ProcessGroup]:
    """Process groups of these ranks; for each member its group."""
    # new_group is a collective of all ranks, members or not: one order everywhere.
    groups = [dist.new_group(list(ranks)) for ranks in members]
    return {rank: group for ranks, group in zip(members, groups, strict=True) for rank in ranks}


def _mesh(grid: RankGrid, device: torch.device) -> DeviceMesh:
    """Data-parallel axes before the tensor-parallel one: ranks that share states are neighbours."""
    copies = grid.dp_replicate
    sizes = (copies, grid.dp // copies) if copies > 1 else (grid.dp,)
    ranks = torch.arange(grid.dp * grid.tp).view(*sizes, grid.tp) + grid.first_rank
    return DeviceMesh(device.type, ranks, mesh_dim_names=(*DATA[copies > 1], "tp"))
