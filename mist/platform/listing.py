"""What ships, and every figure with its unit, kind and source: rows for `mist profiles`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from mist.errors import PlatformError, did_you_mean
from mist.plans.provenance import Kind
from mist.platform.calibration import Calibration
from mist.platform.cluster import Cluster, CollectiveTable, Contention
from mist.platform.device import Device
from mist.platform.op_tables import OpTable
from mist.platform.profiles import (
    Family,
    list_profiles,
    load_calibration,
    load_cluster,
    load_device,
    load_runtime,
)
from mist.platform.quantity import Quantity, unit_of_path
from mist.platform.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One profile in a line; `num_by_kind` counts its figures by how sure they are."""

    name: str
    family: Family
    what: str
    path: Path
    num_by_kind: Mapping[Kind, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """One figure: `path` in the file, `value` in `unit` ("" for counts and ratios).

    A table of measurements is one row: `value` is None and `unit` its size ("21 x 3 times").
    """

    path: str
    value: float | None
    unit: str
    kind: Kind
    source: str


def profile_rows() -> tuple[ProfileRow, ...]:
    """Every profile, devices first. Raises PlatformError for a broken file."""
    return tuple(_row(name, family) for family in Family for name in list_profiles(family))


def figure_rows(name: str) -> tuple[FigureRow, ...]:
    """Every figure of the profile of that name, in the order of its file.

    Raises PlatformError when no family has the name.
    """
    for family in Family:
        if name in list_profiles(family):
            return tuple(figures_of(_load(name, family)))
    known = [known for family in Family for known in list_profiles(family)]
    raise PlatformError(f"{name}: no profile of that name. {did_you_mean(name, known)}")


def figure_names(profile: Device | Cluster | Runtime) -> tuple[str, ...]:
    """The paths of every figure of a profile that is one number."""
    return tuple(row.path for row in figures_of(profile) if row.value is not None)


def _row(name: str, family: Family) -> ProfileRow:
    profile = _load(name, family)
    kinds = [figure.kind for figure in figures_of(profile)]
    return ProfileRow(
        name=name,
        family=family,
        what=profile.what,
        path=list_profiles(family)[name],
        num_by_kind={kind: kinds.count(kind) for kind in Kind if kind in kinds},
    )


def _load(name: str, family: Family) -> Device | Cluster | Runtime | Calibration:
    match family:
        case Family.DEVICE:
            return load_device(name).profile
        case Family.CLUSTER:
            return load_cluster(name).profile
        case Family.RUNTIME:
            return load_runtime(name).profile
        case Family.CALIBRATION:
            return load_calibration(name).profile


def figures_of(record: object, path: str = "") -> Iterator[FigureRow]:
    """The figures of a profile or a part of it at `path`, as they stand in it.

    Depth first through dataclasses, mappings and tuples down to quantities and tables.
    """
    match record:
        case Quantity(value=value, source=source, kind=kind):
            unit = unit_of_path(path)
            yield FigureRow(path=path, value=value, unit=unit, kind=kind, source=source)
        case CollectiveTable(rows=rows, columns=columns, source=source, kind=kind):
            size = f"{len(rows)} x {len(columns) - 1} times"
            yield FigureRow(path=path, value=None, unit=size, kind=kind, source=source)
        case OpTable(shape=shape, source=source, kind=kind):
            size = f"{' x '.join(map(str, shape))} times"
            yield FigureRow(path=path, value=None, unit=size, kind=kind, source=source)
        case Contention(shares=shares, source=source, kind=kind):
            size = f"{len(shares)} x 4 shares"
            yield FigureRow(path=path, value=None, unit=size, kind=kind, source=source)
        case _:
            for step, item in _items(record):
                yield from figures_of(item, f"{path}{step}" if path else step.removeprefix("."))


def _items(record: object) -> Iterator[tuple[str, object]]:
    if is_dataclass(record):
        yield from ((f".{item.name}", getattr(record, item.name)) for item in fields(record))
    elif isinstance(record, Mapping):
        yield from ((f".{key}", value) for key, value in record.items())
    elif isinstance(record, tuple):
        yield from ((f"[{index}]", value) for index, value in enumerate(record))
