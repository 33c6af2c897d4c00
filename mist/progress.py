"""How often long work reports how far it is."""

from typing import Final

NUM_REPORTS: Final = 5  # a line for each piece would fill the log of a job with hundreds


def is_due(done: int, total: int) -> bool:
    """Whether to report after piece `done` (from 1) of `total`: five times, the last one included.

    Of five pieces or fewer after each.
    """
    return NUM_REPORTS * done // total > NUM_REPORTS * (done - 1) // total
