"""`mist validate`: predict the runs of a file, and say how good that is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mist.validate.predictions import predictions
from mist.validate.results import RunPrediction, Score
from mist.validate.runs import read_runs
from mist.validate.scores import scored
from mist.validate.sources import load_sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Predictions in the order of the file, and a score for each source."""

    rows: tuple[RunPrediction, ...]
    scores: Sequence[Score]


def validate(path: Path, *, calibrated: bool, progress: Callable[[str], None]) -> Validation:
    """Predict every run of a file. Raises InputError when it cannot be used."""
    rows = predictions(read_runs(path), load_sources(), calibrated=calibrated, progress=progress)
    return Validation(rows=rows, scores=scored(rows))
