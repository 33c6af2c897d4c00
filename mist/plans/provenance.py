"""Where a number comes from, told beside every figure of a profile and of a plan's op costs."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final, Protocol, TypeVar


class Kind(StrEnum):
    """How sure a number is, from the vendor's sheet to an assumption.

    SPEC: the vendor's. FIT: fitted to published measurements of the part. MEASURED: one published
    or own measurement. CALIBRATED: fitted to whole training runs. GUESS: argued, not measured.
    GIVEN: by the user, for this question.
    """

    SPEC = "spec"
    FIT = "fit"
    CALIBRATED = "calibrated"
    MEASURED = "measured"
    GUESS = "guess"
    GIVEN = "given"


class Sourced(Protocol):
    """What has a source and a kind: a figure, or a table of them."""

    @property
    def source(self) -> str:
        """Where it comes from."""

    @property
    def kind(self) -> Kind:
        """How sure it is."""


S = TypeVar("S", bound=Sourced)

_SUREST_FIRST: Final = (Kind.GIVEN, Kind.SPEC, Kind.FIT, Kind.MEASURED, Kind.CALIBRATED, Kind.GUESS)


def weakest(figures: Iterable[S]) -> S:
    """The least sure of some figures (one or more), the first of equals."""
    return max(figures, key=lambda figure: _SUREST_FIRST.index(figure.kind))
