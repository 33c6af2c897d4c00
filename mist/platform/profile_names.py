"""Profiles by the names that people and drivers write: "A100 80GB", "NVIDIA GeForce RTX 4090".

A name is read as a set of words: without makers, units and the generation of a socket (SXM5 is
sxm). A device is meant where its model (a100, 4090) is among them, and all of them are in its name
or in the line that says what it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from mist.errors import did_you_mean

NO_WORDS: Final = frozenset(
    {"nvidia", "geforce", "tesla", "amd", "instinct", "intel", "oam", "gpu", "gb", "gib", "the"}
)
MOST_SUGGESTED: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Meant:
    """The profiles that a name may stand for; `exact`: one of them has just these words."""

    names: tuple[str, ...]
    exact: str | None

    @property
    def single(self) -> str | None:
        """The profile that is meant, if it is but one."""
        return self.exact or (self.names[0] if len(self.names) == 1 else None)


def meant(name: str, what: Mapping[str, str]) -> Meant:
    """The profiles that a name stands for. `what`: of each profile what it is, in a line."""
    words = _words(name)
    exact = [known for known in what if _words(known) == words]
    names = tuple(
        known
        for known, line in what.items()
        if _model(known) in words and words <= _words(known) | _words(line)
    )
    return Meant(names=names, exact=exact[0] if len(exact) == 1 else None)


def suggestion(name: str, what: Mapping[str, str]) -> str:
    """What to say after an unknown name: the profiles that it is likeliest to mean, else all."""
    words, series = _words(name), _series(name)
    ways = (
        # A beginning is a likelier wish than a name with few other letters; of "a10" it is a10g,
        # and not a100.
        [known for known in what if name and re.match(rf"{re.escape(name.lower())}(?!\d)", known)],
        [known for known, line in what.items() if words and words <= _words(line)],
        [known for known in what if _series(known) & series],
    )
    if likely := next(filter(None, ways), []):
        near = get_close_matches(name.lower(), likely, n=MOST_SUGGESTED, cutoff=0.0)
        return f"Did you mean {' or '.join(near)}?"
    return did_you_mean(name, what)


def _words(text: str) -> frozenset[str]:
    spaced = re.sub(r"(sxm)\d?|(pcie|rtx|gtx)", r" \1\2 ", text.lower())
    spaced = re.sub(r"(\d{4})(ti)(s?)\b", r"\1 \2 \3", spaced)  # of a 4070TiS
    found = (re.sub(r"^(\d+)gi?b?$", r"\1", word) for word in re.findall(r"[a-z0-9]+", spaced))
    return frozenset(found) - NO_WORDS


def _model(name: str) -> str:
    """The word of a profile's name that no other part of it is needed with: a100, 4090, mi300x."""
    parts = name.split("-")
    return next((part for part in parts if re.search(r"[a-z]\d|\d{3}", part)), name)


def _series(name: str) -> set[str]:
    """The letters before the numbers of a model: of "a100" and of "a40" the "a", of 3090 "####"."""
    return {
        match[1] or "#" * len(match[2])
        for word in _words(name)
        if (match := re.fullmatch(r"([a-z]*)(\d+)[a-z]*", word)) and (match[1] or len(match[2]) > 3)
    }
