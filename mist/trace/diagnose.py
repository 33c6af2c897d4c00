"""Turns what a model raises while it is traced into a TraceError that names the line at fault."""

import linecache
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from mist.errors import MistError, TraceError

DATA_DEPENDENT: Final = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
TORCH: Final = str(Path(torch.__file__).parent)
OURS: Final = str(Path(__file__).parent)
LIBRARIES: Final = "site-packages"


class Passed(Exception):
    """Base of signals between our own modules, which are not the model's fault."""


@contextmanager
def traced(name: str) -> Iterator[None]:
    """Within: an exception of the model `name` becomes a TraceError."""
    try:
        yield
    except (MistError, Passed):
        raise
    except Exception as error:
        place = _place(traceback.extract_tb(error.__traceback__))
        if isinstance(error, DATA_DEPENDENT):
            raise TraceError(
                f"{name} decides by the values of its tensors{place}. Mist traces shapes only: "
                "replace the branch or .item() by an operation on tensors, such as torch.where."
            ) from error
        raise TraceError(
            f"{name} cannot be traced: {one_line(error)}{place}. "
            "Check that the model runs on a batch of token ids, or define make_batch(batch, seq)."
        ) from error


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last line of the user's code on the way, else the last one outside torch."""
    outside = [f for f in frames if not f.filename.startswith((TORCH, OURS, "<"))]
    users = [f for f in outside if LIBRARIES not in f.filename] or outside
    if not users:
        return ""
    frame = users[-1]
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f" ({frame.filename}:{frame.lineno}: {code})"
