"""Turns what a model raises while it is traced into a TraceError that names the line at fault."""

import linecache
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
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
# What torch says where sizes do not fit, and what that means of a run on shards.
SHARD_FAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        r"invalid for input of size|view size|split_with_sizes": (
            "a tensor is given a size that a rank's share of it does not have"
        ),
        r"must match|must have same|mismatch|be multiplied|inconsistent|broadcast|Expected size": (
            "a part of a tensor meets a whole one"
        ),
    }
)
# Known by what is raised, or by the library that raises it: what to do.
ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
        r"bitsandbytes": (
            "Modules of bitsandbytes pack their weights on a GPU and do not run without one. Plan "
            "with frozen nn.Linear in their place, or a config.json with quantization_config"
        ),
        r"expected scalar type|to have the same dtype|must have the same dtype|BFloat16": (
            "Parameters take the compute precision, buffers and constants keep theirs, as under "
            "FSDP2's mixed precision. Cast one at that line, or use --precision fp32"
        ),
    }
)
GENERAL_ADVICE: Final = (
    "Check that the model runs on token ids of the length that is asked (--seq), or "
    "define make_batch(batch, seq)"
)
TORCH: Final = str(Path(torch.__file__).parent)
OURS: Final = str(Path(__file__).parent)
RAISED: Final = "torch._subclasses.fake_tensor"  # logs what it raises
LIBRARIES: Final = "site-packages"


class Passed(Exception):
    """Base of signals between our own modules, which are not the model's fault."""


@contextmanager
def traced(name: str) -> Iterator[None]:
    """Within: an exception of the model `name` becomes a TraceError."""
    try:
        with without_log(RAISED):
            yield
    except (MistError, Passed, KeyboardInterrupt):
        raise
    except BaseException as error:  # a model may call sys.exit(), too
        frames = traceback.extract_tb(error.__traceback__)
        place = _place(frames)
        if isinstance(error, DATA_DEPENDENT):
            raise TraceError(
                f"{name} decides by the values of its tensors{place}. Mist traces shapes only: "
                "replace the branch or .item() by an operation on tensors, such as torch.where."
            ) from error
        raise TraceError(
            f"{name} cannot be traced: {one_line(error)}{place}. {_advice(error, frames)}."
        ) from error


def _advice(error: BaseException, frames: Sequence[traceback.FrameSummary]) -> str:
    """What to do about an exception that was raised in the last of these frames."""
    text = "\n".join((one_line(error), *(frame.filename for frame in frames[-1:])))
    known = (advice for pattern, advice in ADVICE.items() if re.search(pattern, text))
    return next(known, GENERAL_ADVICE)


@contextmanager
def without_log(name: str) -> Iterator[None]:
    """Within: the logger `name` and those below it are silent; we say it in our words."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def shard_words(error: BaseException) -> str:
    """Why a model does not run on shards, in our words, and the line of it at fault.

    What torch says is of its own inner sizes; it stays the cause of what is raised.
    """
    place = _place(traceback.extract_tb(error.__traceback__))
    if isinstance(error, DATA_DEPENDENT):
        return f"a branch depends on the size of a share{place}"
    text = str(error)
    words = (words for pattern, words in SHARD_FAULTS.items() if re.search(pattern, text))
    return next(words, "an operation does not run on a part of its tensors") + place


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # of an exception that cannot say what it is
        lines = []
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
