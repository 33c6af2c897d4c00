"""A dry run on fake tensors sees what the same observer sees on real gloo ranks."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mist.exec.dryrun.dry_run import extend_totals, look
from tests.exec.forking import RunRanks, interpreters
from tests.exec.layouts import plan_of, write_models
from tests.exec.running import variant_of

FAST = (
    "zero3 accumulated",
    "tp2 sp levels",
    "activations 1.0",
)
SLOW = (
    "pp2 converted",
    "zero1 accumulated",
    "pp2 1+3",
    "head checkpointed zero3",
    "zero0 accumulated",
    "zero2 accumulated",
    "pp2 interleaved",
    "full 4 zero3",
    "mixed levels zero2",
    "tp2",
    "tp2 sp",
    "pp2 gpipe",
    "pp2 zero-bubble",
    "pp2 zero-bubble dp2 zero2",
    "optimizer 0.3",
    "bf16 zero2 levels",
    "converted zero3",
    "gpt2 converted zero2",
    "gpt2 tied pp2 head in-forward",
    "pp3 1+2+1",
    "hsdp zero2 accumulated",
    "hsdp zero3 accumulated",
    "dp2 to tp2",
    "tp2 sp to dp2",
    "dp2 to dp1",
    "mixtral zero3",
    "gpt-oss pp2",
)
MAX_DIFFERENCE = 0.005  # of the peak: one small activation

Rank = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("dryrun")
    write_models(path)
    return path


@pytest.fixture(scope="module")
def real(folder: Path, forked: RunRanks) -> Callable[[tuple[str, ...]], list[Rank]]:
    """What every rank of some layouts saw, in one launch for each number of ranks."""

    @cache
    def run(layouts: tuple[str, ...]) -> list[Rank]:
        ranks: list[Rank] = [{}, {}, {}, {}]
        launch = forked if layouts is FAST else interpreters
        for number in (2, 3, 4):
            names = [name for name in layouts if variant_of(name).world_size == number]
            if names:
                launch("tests.exec.observing", folder, folder, *names, num_ranks=number)
                for rank in range(number):
                    ranks[rank] |= json.loads((folder / f"{rank}.json").read_text())
        return ranks

    return run


@pytest.mark.parametrize(
    ("name", "together"),
    [
        *(pytest.param(name, FAST, id=name) for name in FAST),
        *(pytest.param(name, SLOW, id=name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_a_dry_run_sees_what_a_real_one_does(
    name: str,
    together: tuple[str, ...],
    real: Callable[[tuple[str, ...]], list[Rank]],
    folder: Path,
) -> None:
    plan = plan_of(variant_of(name), folder)
    for index, stage in enumerate(plan.stages):
        dry, done = look(plan, index, "cpu"), real(together)[stage.devices[0]][name]
        assert dry.peak_bytes == pytest.approx(done["peak_bytes"], rel=MAX_DIFFERENCE)
        assert dry.host_bytes == pytest.approx(done["host_bytes"], rel=MAX_DIFFERENCE)
        assert (dry.host_bytes > 0) is any(asdict(stage.offload).values())
        rows = [[row.axis, row.kind, row.count, row.bytes] for row in dry.collectives]
        assert rows == done["rows"]
        assert sum(dry.parts_bytes.values()) == dry.peak_bytes


def test_micro_batches_that_were_not_run_are_like_the_second() -> None:
    key = ("dp", "reduce_scatter")
    ends = [{key: (4, 40)}, {key: (7, 70)}]
    assert extend_totals({key: (10, 100)}, ends, 5) == {key: (25, 250)}
