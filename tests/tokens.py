"""Numbers for the symbols that transient bytes have beside b, s and t."""

from sympy import Symbol

from mist.model.graph import GATHER_COPY, GATHERS, SCATTER_COPY, Q


def tokens(shards: int, samples: int) -> dict[Symbol, int]:
    """Sequence parallelism over `shards` ranks (1: none) as torch runs it on so many samples."""
    gathers = int(shards > 1)
    several = int(samples > 1)
    return {Q: shards, GATHERS: gathers, SCATTER_COPY: gathers, GATHER_COPY: gathers * several}
