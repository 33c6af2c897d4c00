"""`mist validate`: predict the runs of a file, and say how good that is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mist.validate.measured_runs import read_runs, read_stages
from mist.validate.predictions import predictions
from mist.validate.results import RunPrediction, Score
from mist.validate.scores import scored
from mist.validate.sources import load_sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Predictions in the order of the file, and a score for each source."""

    rows: tuple[RunPrediction, ...]
    scores: Sequence[Score]


def validate(
    path: Path,
    stages_path: Path | None = None,
    sources_path: Path | None = None,
    *,
    calibrated: bool,
    progress: Callable[[str], None],
) -> Validation:
    """Predict every run of a file; `stages_path`: layers and peaks of unequal pipeline stages.

    `sources_path`: a table of sources of the user's own, whose rows go before the shipped ones.

    Raises InputError when a file cannot be used.
    """
    runs = read_runs(path)
    stages = read_stages(stages_path) if stages_path else {}
    sources = load_sources(sources_path)
    rows = predictions(runs, sources, stages=stages, calibrated=calibrated, progress=progress)
    return Validation(rows=rows, scores=scored(rows, stages))
