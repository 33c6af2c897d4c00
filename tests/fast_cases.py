"""Which cases of a test are fast: `make test` shows each kind, `make test-slow` every case."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_fast(cases: Iterable[Any], most: int = 1, *, width: int = 1) -> list[Any]:
    """The cases as parameters, of which all behind the first few are slow.

    `width`: how many arguments a case has.
    """
    found = []
    for index, case in enumerate(cases):
        known = case if hasattr(case, "marks") else None
        values = known.values if known else ((case,) if width == 1 else tuple(case))
        marks = [*(known.marks if known else ()), *([pytest.mark.slow] if index >= most else [])]
        found.append(pytest.param(*values, id=known.id if known else None, marks=marks))
    return found
