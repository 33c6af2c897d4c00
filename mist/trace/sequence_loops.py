"""Refuses a loop over the sequence in Python: a scan step by step, which a GPU runs as one kernel.

Recorded as it is written, such a scan of some hundred tokens takes minutes, and its price would be
that of a program that nobody trains with. It is known by its operations: the model runs more of
them for each further token. Chunks, and layers however many, do not grow so.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from mist.errors import TraceError

# Tokens: few enough that a loop takes no time, then what a model in patches or chunks may take.
PROBES: Final = ((32, 64), (128, 256))


class SequenceLoop(TraceError):
    """A model that runs operations for each token in turn, at any length."""


def refuse_loops(name: str, ops_of: Callable[[int], Counter[str]]) -> None:
    """Raise SequenceLoop when a model runs at least an operation more for each further token.

    `ops_of`: how many operations each module runs in a forward pass at a number of tokens. A length
    that the model does not take tells nothing.
    """
    module, growth = next(_growths(ops_of), ("", 0.0))
    if growth >= 1:
        raise SequenceLoop(
            f"{name} cannot be traced: {module or 'its forward'} runs {growth:.0f} operations for "
            "each token, in a loop over the sequence. A GPU runs such a scan as one kernel, "
            "which Mist has no costs for. Use a scan by chunks (as Mamba-2's) or attention instead."
        )


def _growths(ops_of: Callable[[int], Counter[str]]) -> Iterator[tuple[str, float]]:
    """Of each pair of lengths that the model takes: operations for each further token.

    With them the module that most of them run in.
    """
    for short, long in PROBES:
        try:
            few, many = ops_of(short), ops_of(long)
        except TraceError:
            continue
        (module, _), *_ = (many - few).most_common(1) or [("", 0)]
        yield module, (many.total() - few.total()) / (long - short)
