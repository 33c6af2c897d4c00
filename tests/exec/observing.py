"""One real rank of a batch of variants: the peak and the collectives of a step, by the observer."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from mist.exec.anatomy import examine
from mist.exec.batches import Batches
from mist.exec.group import joined
from mist.exec.loading import load
from mist.exec.observe import Observer, observed
from mist.exec.parallel import Parallel, build, subject_of
from mist.spec import Attention
from tests.exec.layouts import SEQ_LEN, plan_of
from tests.exec.parity import SEED, settings
from tests.exec.variants import VARIANTS

NUM_STEPS = 3  # threads of gloo may hold a buffer a moment longer: the least of these counts


def observe(parallel: Parallel, batch: object) -> Observer:
    """One step as the observer sees it."""
    observer = Observer(parallel, parallel.axes)
    parallel.swapper.quietly = observer.on_host
    with observed(observer, parallel):
        parallel.unread_step(batch)
    return observer


def main(folder: Path, out: Path, names: list[str]) -> None:
    found = {}
    with joined(25.0) as device:
        for name in names:
            variant = next(v for v in VARIANTS if v.name == name)
            plan = plan_of(variant, folder)
            loaded = load(plan.model.source, Attention.FLASH)
            subject = subject_of(loaded, examine(loaded, SEQ_LEN), plan)
            parallel = build(subject, plan, device, settings(1.0), SEED)
            batch = Batches(loaded, plan.workload, SEED).step(0)
            parallel.train_step(batch)
            observer = min(
                (observe(parallel, batch) for _ in range(NUM_STEPS)), key=lambda o: o.peak_bytes
            )
            rows = [[*key, *row] for key, row in sorted(observer.measured_rows().items())]
            found[name] = {
                "rank": dist.get_rank(),
                "peak_bytes": observer.peak_bytes,
                "host_bytes": observer.host_peak_bytes,
                "rows": rows,
            }
        (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
