"""Which points are run for a fit, and where it ends early; test_any.py compares the polynomials."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from mist.trace.expressions import Size
from mist.trace.models.loader import LoadedModel, MakeBatch
from mist.trace.polynomial_fit import NotPolynomial, _runs
from mist.trace.recording.recorded_run import Point, RecordedRun

POINTS = [(2, 64), (2, 128), (3, 64), (3, 128)]


@dataclass
class Recorder:
    """Records runs of a number of operations for each token."""

    ops_per_token: int
    points: list[Point]

    def run(self, point: Point) -> RecordedRun:
        self.points.append(point)
        ops = range(10 + self.ops_per_token * (point.seq or 0))
        pieces = (SimpleNamespace(part=SimpleNamespace(ops=ops)),)
        return cast(RecordedRun, SimpleNamespace(pieces=pieces))


def test_samples_of_one_size_are_run_once_for_each_batch() -> None:
    recorder = Recorder(0, [])
    assert len(_runs(recorder.run, POINTS, batch=None, one_size=True)) == 4
    assert [point.batch for point in recorder.points] == [2, 3]
    recorder.points.clear()
    _runs(recorder.run, POINTS, batch=None, one_size=False)
    assert [(point.batch, point.seq) for point in recorder.points] == POINTS


def test_more_operations_for_more_tokens_end_a_fit_at_its_second_run() -> None:
    recorder = Recorder(1, [])
    with pytest.raises(NotPolynomial, match="the same operations"):
        _runs(recorder.run, POINTS, batch=None, one_size=False)
    assert len(recorder.points) == 2


def images(batch: Size, seq: Size) -> torch.Tensor:
    return torch.zeros(batch, 3, 8, 8)


def tokens(batch: Size, seq: Size) -> torch.Tensor:
    return torch.zeros(batch, seq, dtype=torch.int64)


def picky(batch: Size, seq: Size) -> torch.Tensor:
    assert seq == 384
    return torch.zeros(batch, 3)


@pytest.mark.parametrize(
    ("make_batch", "one_size"), [(images, True), (tokens, False), (picky, False)]
)
def test_one_size_is_seen_in_the_batch(make_batch: MakeBatch, one_size: bool) -> None:
    model = LoadedModel(module=nn.Linear(3, 3), name="net", make_batch=make_batch, loss=None)
    assert model.is_one_size(384) is one_size
