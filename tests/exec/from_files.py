"""Rank program: first loss and parameters from files under several layouts (test_stored_weights).

`python -m tests.exec.from_files DIR`: DIR has the folders and, for each, the loss of the file.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from mist.exec.build.batches import Batches
from mist.exec.build.parallel import assemble, initialise
from mist.exec.build.process_group import process_group
from mist.exec.build.weight_init import Whole
from mist.exec.run.stored_weights import Tensor, stored_weights
from tests.exec.layouts import S, Variant, plan_of
from tests.exec.parity import SEED, difference, settings
from tests.exec.subjects import known_subject

VARIANTS = (
    Variant(name="zero3", model="untied", stages=(S(dp=2, zero=3),), micro=8),
    Variant(name="tp2", model="untied", stages=(S(tp=2, sp=True, zero=1),), micro=8),
    Variant(name="pp2", model="untied", stages=(S(layers=(1,)), S(layers=(3,))), micro=4),
    Variant(name="tied", model="tied", stages=(S(layers=(1,)), S(layers=(3,))), micro=4),
)


@dataclass(kw_only=True)
class Counted:
    """Notes the bytes that are read of a stored tensor."""

    stored: Tensor
    read: list[int]

    def __getitem__(self, bounds: tuple[slice, ...]) -> torch.Tensor:
        part = self.stored[bounds]
        self.read.append(part.numel() * part.element_size())
        return part


def found(variant: Variant, folder: Path, device: torch.device) -> dict[str, object]:
    plan = plan_of(variant, folder)
    subject = known_subject(plan)
    read: list[int] = []
    stored = stored_weights(folder / variant.model, subject.loaded.module)
    values: Mapping[str, Whole] = {n: Counted(stored=s, read=read) for n, s in stored.items()}
    subject = replace(subject, values=values)
    parallel = assemble(subject, plan, device, settings(None))
    initialise(parallel, subject, SEED)
    whole = torch.load(folder / f"{variant.model}.pt", weights_only=True)
    error = torch.tensor(difference(parallel, parallel.parameters, whole))
    dist.all_reduce(error, dist.ReduceOp.MAX)
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, sum(read))
    loss = parallel.train_step(Batches(subject.loaded, plan.workload, SEED).step(0)).loss
    return {"error": error.item(), "read": sizes, "loss": loss}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with process_group(300.0) as where:
        results = {variant.name: found(variant, place, where) for variant in VARIANTS}
        if dist.get_rank() == 0:
            (place / "found.json").write_text(json.dumps(results))
        dist.barrier()
