"""One real rank of a batch of variants: the peak and the collectives of a step, by the observer."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from mist.exec.build.process_group import process_group
from mist.exec.dryrun.observer import Observer, observing
from tests.exec.running import Run, variant_of

NUM_STEPS = 3  # threads of gloo may hold a buffer a moment longer: the least of these counts


def observe(run: Run) -> Observer:
    """One step as the observer sees it."""
    observer = Observer(run.parallel)
    run.parallel.swapper.quietly = observer.on_host
    with observing(observer, run.parallel):
        run.parallel.unread_step(run.batches.step(0))
    return observer


def main(folder: Path, out: Path, names: list[str]) -> None:
    found = {}
    with process_group(300.0) as device:
        for name in names:
            run = Run(variant_of(name), folder, device, max_norm=1.0)
            run.train(0, 1)
            observers = [observe(run) for _ in range(NUM_STEPS)]
            observer = min(observers, key=lambda each: each.peak_bytes)
            rows = [[*key, *row] for key, row in sorted(observer.rows().items())]
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
