"""Step times from a run's log: {"steps": [{"step": 1, "seconds": 0.9, ...}, ...]} as JSON."""

import json
from pathlib import Path
from statistics import median
from typing import Final

from mist.errors import InputError

WARM_UP: Final = 2  # steps that compile, allocate and connect; left out where there are enough


def step_seconds(path: Path) -> float:
    """The median step of a log, without the first two of five or more. Raises InputError."""
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        seconds = [float(step["seconds"]) for step in steps]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} is no log of a run: expected {{"steps": [{{"seconds": 1.5}}, ...]}} as JSON.'
        ) from error
    if not seconds or min(seconds) <= 0:
        raise InputError(f"{path} has no steps with seconds above 0.")
    return median(seconds[WARM_UP:] if len(seconds) > 2 * WARM_UP else seconds)
