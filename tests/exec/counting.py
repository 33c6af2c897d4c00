"""One rank of a batch of variants: the collectives of a step of each, as rank 0 issues them."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from mist.exec.build.process_group import process_group
from tests.exec.running import Run, variant_of


def main(folder: Path, out: Path, names: list[str]) -> None:
    found = {}
    with process_group(300.0) as device:
        for name in names:
            run = Run(variant_of(name), folder, device, max_norm=None)
            _, measured = run.parallel.counted_step(run.batches.step(0))
            rows = [asdict(row) for row in measured.collectives]
            found[name] = {"peak_bytes": measured.peak_bytes, "collectives": rows}
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
