"""One rank of layouts that are given batches of other shapes: what every rank says."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mist.errors import InputError
from mist.exec.build.process_group import process_group
from tests.exec.layouts import BATCH, SEQ_LEN, S, Variant
from tests.exec.running import Run

LAYOUTS = (
    Variant(name="dp2", stages=(S(dp=2, zero=3),), micro=8),
    Variant(name="tp2", stages=(S(tp=2),), micro=8),
    Variant(name="pp2", stages=(S(layers=(2,)), S(layers=(2,))), micro=8),
)


def said(run: Run) -> Iterator[str]:
    ids = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64)
    wrong = (
        {"input_ids": ids[:, 1:], "labels": ids[:, 1:]},
        {"input_ids": ids[:-2], "labels": ids[:-2]},
        {"input_ids": ids},
    )
    for batch in wrong:
        try:
            run.parallel.train_step(batch)
        except InputError as error:
            yield str(error)
    run.parallel.train_step({"input_ids": ids, "labels": ids})


def main(folder: Path, out: Path) -> None:
    found: dict[str, list[str]] = {}
    with process_group(300.0) as device:
        for variant in LAYOUTS:
            mine = list(said(Run(variant, folder, device, max_norm=None)))
            every: list[list[str]] = [[], []]
            dist.all_gather_object(every, mine)
            found[variant.name] = [text for texts in every for text in texts]
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
