"""One rank of a batch of variants: the collectives of a step of each, as rank 0 issues them."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from mist.exec.anatomy import examine
from mist.exec.batches import Batches
from mist.exec.group import joined
from mist.exec.loading import load
from mist.exec.parallel import build, subject_of
from mist.spec import Attention
from tests.exec.layouts import SEQ_LEN, plan_of
from tests.exec.parity import SEED, settings
from tests.exec.variants import VARIANTS


def main(folder: Path, out: Path, names: list[str]) -> None:
    found = {}
    with joined(25.0) as device:
        for name in names:
            variant = next(v for v in VARIANTS if v.name == name)
            plan = plan_of(variant, folder)
            loaded = load(plan.model.source, Attention.FLASH)
            subject = subject_of(loaded, examine(loaded, SEQ_LEN), plan)
            parallel = build(subject, plan, device, settings(None), SEED)
            batch = Batches(loaded, plan.workload, SEED).step(0)
            parallel.train_step(batch)
            _, measured = parallel.measured_step(batch)
            rows = [asdict(row) for row in measured.collectives]
            found[name] = {"peak_bytes": measured.peak_bytes, "collectives": rows}
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
