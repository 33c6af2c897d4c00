"""Refuses a loop over the sequence in Python: a scan step by step, which a GPU runs as one kernel.

Recorded as it is written, such a scan of some hundred tokens takes minutes, and its price would be
that of a program that nobody trains with. It is known by its operations: one module runs more of
them for each further token. Chunks, and layers however many, do not grow so.
"""

from collections.abc import Callable
from typing import Final

from mist.errors import TraceError

PROBES: Final = (32, 64)  # tokens: few enough that a loop takes no time


def refuse_loops(name: str, module: str, num_ops: Callable[[int], int]) -> None:
    """Raise TraceError when a module runs at least an operation more for each further token.

    `num_ops`: how many operations the module runs at a number of tokens. A length that the model
    does not take tells nothing.
    """
    short, long = PROBES
    try:
        growth = (num_ops(long) - num_ops(short)) / (long - short)
    except TraceError:
        return
    if growth >= 1:
        raise TraceError(
            f"{name} cannot be traced: {module or 'its forward'} runs {growth:.0f} operations for "
            "each token, in a Python loop over the sequence. A GPU runs such a scan as one kernel, "
            "which Mist has no costs for. Use a scan by chunks (as Mamba-2's) or attention instead."
        )
