"""Everything Mist refuses, as one tree; each class knows the exit code of the command line.

    MistError (2)
    +- InputError (2)             what the user gave cannot be used
    |  +- ModelError              the model file, configuration or preset
    |  |  +- TraceError           the model loads but its cost cannot be traced
    |  +- PlatformError           GPU, cluster or runtime: unknown name, wrong count, broken profile
    |  +- PlanError               a plan file; carries every fault with its path
    |  +- OutputError             the place to write to
    +- Infeasible (3)             a good question whose answer is: nothing fits
    |  +- StatesTooLarge          no layout can: all memory is less than the states of the model
    +- CheckpointError (1)        a run could not save what it has trained

A message says what was asked, what was found, which rule failed and what to try.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

CONTROLS: Final = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(line: str) -> str:
    """A line with control characters as their escapes, as in Python: names come from files.

    Terminals obey some of them, and marks of direction show a name as another one. Surrogates
    cannot be written at all.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


class MistError(Exception):
    """Anything Mist refuses; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(MistError):
    """What the user gave cannot be used."""


class ModelError(InputError):
    """The model file, configuration or preset cannot be loaded."""


class TraceError(ModelError):
    """The model loads, but its costs cannot be traced."""


class PlatformError(InputError):
    """A GPU, cluster or runtime that is unknown, unusable or broken."""


class OutputError(InputError):
    """The output cannot be written where it was asked for."""


class Infeasible(MistError):
    """Nothing in the search space fits; the message names the tightest constraint."""

    exit_code = 3


class StatesTooLarge(Infeasible):
    """All devices and their hosts hold less than the states of the model; the message is whole."""


class CheckpointError(MistError):
    """A run could not save what it has trained: a full disk, a folder that is gone."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a plan file: where (`stages[1].offload.weights`) and what."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class PlanError(InputError):
    """A plan that breaks its schema or its invariants, with all faults at once."""

    def __init__(self, source: str, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n  {fault}" for fault in self.faults)
        plural = "s" if len(self.faults) > 1 else ""
        super().__init__(f"{source} has {len(self.faults)} fault{plural}:{lines}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an unknown-name message: the nearest names, or all of them."""
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(names)}."
