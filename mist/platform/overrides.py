"""Figures that a user sets in place of those of profiles: `--set cluster.host_memory_bytes=64GB`.

A figure is named by its profile (device, cluster or runtime) and by its path in it, as `mist
profiles show NAME` lists it. What results is checked as the file of a profile is.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from mist.errors import PlatformError
from mist.plans.provenance import Kind
from mist.platform.calibration import Profiles
from mist.platform.cluster import Cluster
from mist.platform.device import Device
from mist.platform.listing import figure_names
from mist.platform.profiles import check
from mist.platform.quantity import unit_of_path
from mist.platform.runtime import Runtime
from mist.units import parse_number

FAMILIES: Final[tuple[type[Device] | type[Cluster] | type[Runtime], ...]] = (
    Device,
    Cluster,
    Runtime,
)
NAMES: Final = tuple(shape.__name__.lower() for shape in FAMILIES)
HOST_MEMORY: Final = "cluster.host_memory_bytes"
# Of a profile, and no figure: 0 is off, 1 is on.
SEQUENCE_SWITCH: Final = "runtime.knobs.sequence_parallel"
OWN: Final = "the user's own figure"
NO_FIGURE: Final = object()

Overrides = Mapping[str, float]
"""Values by name of the figure, in the unit of its key."""
NO_OVERRIDES: Final[Overrides] = MappingProxyType({})


def is_figure(word: str) -> bool:
    """Whether a word of `--set` is about a profile ("cluster.x=1"), not about a knob ("tp=2")."""
    return word.partition(".")[0] in NAMES


def knobs_and_figures(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words of `mist plan --set` about knobs, and those about figures."""
    known = list(words)
    return [w for w in known if not is_figure(w)], [w for w in known if is_figure(w)]


def overrides_of(words: Iterable[str]) -> dict[str, float]:
    """What words such as "device.memory_bytes=24GB" set.

    Raises PlatformError for what cannot be read, or is set twice.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if not is_figure(word):
            raise PlatformError(
                f"--set {word}: no figure of a profile. Its name begins with "
                f"{', '.join(f'{each}.' for each in NAMES)}: --set {HOST_MEMORY}=64GB."
            )
        if name in found:
            raise PlatformError(f"--set {word}: {name} is set twice.")
        try:
            found[name] = parse_number(text, unit_of_path(name))
        except ValueError as error:
            raise PlatformError(f"--set {word}: {error}") from None
    return found


def overridden(profiles: Profiles, overrides: Overrides) -> Profiles:
    """The profiles with the user's figures in place of theirs.

    Raises PlatformError for a figure that a profile does not have, or a value that it cannot.
    """
    device, cluster, runtime = (
        _with(profile, family, overrides) for profile, family in zip(profiles, NAMES, strict=True)
    )
    return device, cluster, runtime


def _with(profile: Any, family: str, overrides: Overrides) -> Any:  # noqa: ANN401 - any profile
    """One profile with its own figures among these."""
    own = {name: value for name, value in overrides.items() if name.startswith(f"{family}.")}
    if not own:
        return profile
    from pydantic import TypeAdapter

    shape = type(profile)
    data = TypeAdapter(shape).dump_python(profile, mode="json")
    for name, value in own.items():
        place, leaf = _place(data, name, profile), name.rpartition(".")[2]
        own_figure = {"value": value, "source": OWN, "kind": Kind.GIVEN.value}
        place[leaf] = _switched(name, value) if name == SEQUENCE_SWITCH else own_figure
    if HOST_MEMORY in own:
        data["host_memory_by_device"] = {}  # the user's figure is of the nodes at hand
    words = ", ".join(f"{name}={value:g}" for name, value in own.items())
    return check(data, shape, Path(f"--set {words}"))


def _switched(name: str, value: float) -> bool:
    if value not in (0.0, 1.0):
        raise PlatformError(f"--set {name}={value:g}: it is a switch, 0 or 1.")
    return bool(value)


def _place(data: Any, name: str, profile: Any) -> Any:  # noqa: ANN401 - as JSON has it
    """The mapping of a profile's data that holds a figure. Raises PlatformError without it."""
    place = data
    try:
        *steps, leaf = re.findall(r"[^.\[\]]+", name)[1:]
        for step in steps:
            place = place[int(step) if isinstance(place, list) else step]
        figure = place[leaf]
    except (KeyError, IndexError, TypeError, ValueError):
        figure = NO_FIGURE
    # Null is a figure that may be there (`max_nodes`); other settings have no value and source.
    is_figure_there = figure is None or (isinstance(figure, dict) and "value" in figure)
    if is_figure_there or name == SEQUENCE_SWITCH:
        return place
    family = name.partition(".")[0]
    known = [f"{family}.{path}" for path in figure_names(profile)]
    near = get_close_matches(name, known, n=3, cutoff=0.7)
    raise PlatformError(
        f"--set {name}: {family} {profile.name} has no figure of that name. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"mist profiles show {profile.name} lists them."
    )
