"""Profiles: YAML files of a device, a cluster or a runtime, found by name or path and checked.

A name is looked up in the user's folder (platformdirs' configuration folder of "mist"), then among
the files that ship with Mist. All faults of a file are reported at once, each with its path.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from mist.documents import Document, parse_yaml, refuse_other_kind
from mist.errors import Fault, PlatformError, did_you_mean
from mist.files import is_file, read_bytes, user_path
from mist.platform.base_profile import base_of, over_base
from mist.platform.calibration import Calibration
from mist.platform.cluster import Cluster
from mist.platform.device import Device
from mist.platform.machine import SCHEMA, Machine
from mist.platform.profile_names import meant, suggestion
from mist.platform.quantity import Record
from mist.platform.runtime import Runtime

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails


class Family(StrEnum):
    """What a profile describes; also the option that names one on the command line.

    No option names a calibration: the runtime and the device do.
    """

    DEVICE = "device"
    CLUSTER = "cluster"
    RUNTIME = "runtime"
    CALIBRATION = "calibration"

    @property
    def folder(self) -> str:
        """Folder of the family's files."""
        return f"{self.value}s"

    @property
    def option(self) -> str:
        """The command line's option."""
        return "--gpu" if self is Family.DEVICE else f"--{self.value}"


P = TypeVar("P", Device, Cluster, Runtime, Calibration, Machine)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[P]):
    """A checked profile, the file it came from, and "sha256:..." of that file's content."""

    profile: P
    path: Path
    sha256: str


def load_device(name: str) -> Loaded[Device]:
    """The device of that name or path. Raises PlatformError when unknown or broken."""
    return _load(name, Family.DEVICE, Device)


def load_cluster(name: str) -> Loaded[Cluster]:
    """The cluster of that name or path. Raises PlatformError when unknown or broken."""
    return _load(name, Family.CLUSTER, Cluster)


def load_runtime(name: str) -> Loaded[Runtime]:
    """The runtime of that name or path. Raises PlatformError when unknown or broken."""
    return _load(name, Family.RUNTIME, Runtime)


def load_calibration(name: str) -> Loaded[Calibration]:
    """The calibration of that name, "RUNTIME-DEVICE", or path.

    Raises PlatformError when unknown or broken.
    """
    return _load(name, Family.CALIBRATION, Calibration)


def find_machine(cluster: str | None) -> Loaded[Machine] | None:
    """The measured machine in a file that --cluster names; None for a cluster's own file or name.

    Raises PlatformError when there is no such file, or it is broken.
    """
    if cluster is None or not is_path(cluster):
        return None
    path = find_profile(cluster, Family.CLUSTER)
    return _read(path, Machine) if is_machine(path) else None


def is_machine(path: Path) -> bool:
    """Whether there is such a file, and it is of a measured machine (broken or not)."""
    if not is_file(path):
        return False
    content = read_bytes(path, PlatformError)
    # Most files are of a cluster: to look for the words is quicker than to parse.
    if f"schema: {SCHEMA}".encode() not in content:
        return False
    return read_yaml(content, path).get("schema") == SCHEMA


def list_profiles(family: Family) -> dict[str, Path]:
    """Names of a family's profiles and their files, sorted; the user's own hide shipped ones."""
    files: dict[str, Path] = {}
    # The user's folder comes last, and so replaces shipped files of the same name.
    for folder in reversed(_folders()):
        files |= {path.stem: path for path in (folder / family.folder).glob("*.yaml")}
    return dict(sorted(files.items()))


def find_profile(name: str, family: Family) -> Path:
    """The file of a profile given by name or path. Raises PlatformError when there is none."""
    if is_path(name):
        path = user_path(name)
        if not is_file(path):
            raise PlatformError(f"{family.option} {name}: no such file.")
        return path
    known = list_profiles(family)
    return known[name] if name in known else known[_meant(name, family, known)]


def _meant(name: str, family: Family, known: Mapping[str, Path]) -> str:
    """The profile that a name which is none's stands for. Raises PlatformError."""
    lines = {other: _what(path) for other, path in known.items()}
    found = meant(name, lines)
    if found.single:
        return found.single
    if found.names:
        raise PlatformError(
            f"{family.option} {name}: more than one {family} is called so. "
            f"Give {' or '.join(found.names)}."
        )
    raise PlatformError(
        f"{family.option} {name}: no {family} of that name. {suggestion(name, lines)} "
        f"For another one, change figures of the nearest (--set {family}.FIGURE=VALUE; mist "
        "profiles show NAME lists them), or add a profile (docs/extending.md)."
    )


def _what(path: Path) -> str:
    """What a profile is, in a line; of a broken file nothing, since another one is asked for."""
    match = re.search(rb"^what: (.*)$", path.read_bytes(), re.MULTILINE)
    return match[1].decode(errors="replace") if match else ""


def is_path(name: str) -> bool:
    """Whether it names a file, not a profile."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def user_folder() -> Path:
    """Where a user's own profiles lie."""
    import platformdirs

    return Path(platformdirs.user_config_dir("mist")) / "profiles"


def _folders() -> tuple[Path, ...]:
    """Where profiles are looked for, the first hit wins: the user's folder, then what ships."""
    package = Path(__file__).parent.parent
    shipped = (package / "profiles", package.parent / "profiles")
    return (user_folder(), next((folder for folder in shipped if folder.is_dir()), shipped[0]))


def _load(name: str, family: Family, shape: type[P]) -> Loaded[P]:
    return _read(find_profile(name, family), shape)


def _read(path: Path, shape: type[P]) -> Loaded[P]:
    kind: Any = shape  # mypy holds the class of a record that cannot be hashed for unhashable
    content = read_bytes(path, PlatformError)
    base = base_of(content)
    loaded: Loaded[P] = _parsed(content, path, kind, base and _base(base, path, shape))
    return loaded


def _base(name: str, path: Path, shape: type[Any]) -> Path:
    """The file of the profile that the one at `path` is like. Raises PlatformError for none."""
    known = list_profiles(Family(shape.__name__.lower()))
    if name not in known:
        raise PlatformError(f"{path} is like {name}: {did_you_mean(name, known)}")
    if base_of(read_bytes(known[name], PlatformError)):
        raise PlatformError(f"{path} is like {name}, which is like another one. Name that.")
    return known[name]


# The content is part of the key: a file that is edited meanwhile is read again.
@cache
def _parsed(content: bytes, path: Path, shape: type[Any], base: Path | None) -> Loaded[Any]:
    """A file's record, checked once for what the file holds."""
    data, sha256 = read_yaml(content, path), hashlib.sha256(content).hexdigest()
    if base is not None:
        below = read_bytes(base, PlatformError)
        data = over_base(data, read_yaml(below, base))
        sha256 = hashlib.sha256(content + below).hexdigest()
    return Loaded(profile=check(data, shape, path), path=path, sha256=f"sha256:{sha256}")


def read_yaml(content: bytes, path: Path) -> Mapping[str, object]:
    """The mapping in a YAML file. Raises PlatformError when it is none, or has a key twice."""
    document = parse_yaml(content, path, PlatformError)
    if not isinstance(document, Document):
        raise PlatformError(f"{path} is not a mapping of keys to values.")
    if document.repeated:
        raise PlatformError(f"{path} gives {' and '.join(document.repeated)} twice.")
    return document.data


def load_shipped(relative: str, shape: type[R]) -> R:
    """A file of the shipped profiles' folder. Raises PlatformError when it is broken."""
    path = _folders()[-1] / relative
    return check(read_yaml(read_bytes(path, PlatformError), path), shape, path)


def find_calibration(runtime: str, device: Device) -> Loaded[Calibration] | None:
    """What whole runs say about a runtime on a device or another with its chip, if any.

    Raises PlatformError when the file is broken.
    """
    path = list_profiles(Family.CALIBRATION).get(f"{runtime}-{device.chip or device.name}")
    return _read(path, Calibration) if path else None


def check(data: Mapping[str, object], shape: type[R], path: Path) -> R:
    """The record in `data`. Raises PlatformError with every fault and its path."""
    from pydantic import ValidationError

    kind: Any = shape
    if "schema" in kind.__dataclass_fields__:
        (schema,) = get_args(kind.__dataclass_fields__["schema"].type)
        refuse_other_kind(data, schema, path, PlatformError)
    try:
        record: R = _adapter(kind).validate_python(data)
        return record
    except ValidationError as error:
        faults = [_fault(detail, error.errors()) for detail in error.errors()]
    lines = "".join(f"\n  {fault}" for fault in faults)
    plural = "s" if len(faults) > 1 else ""
    raise PlatformError(f"{path} has {len(faults)} fault{plural}:{lines}")


@cache
def _adapter(shape: type[Any]) -> "TypeAdapter[Any]":
    """What checks records of this shape: slow to make."""
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _fault(detail: "ErrorDetails", others: "list[ErrorDetails]") -> Fault:
    """One pydantic error in our words; an unknown key comes with those missing in its record."""
    place, message, value = detail["loc"], detail["msg"], detail["input"]
    match detail["type"]:
        case "unexpected_keyword_argument":
            missing = [str(e["loc"][-1]) for e in others if _is_missing_beside(e, place)]
            message = (
                f"unknown key; missing here: {', '.join(missing)}" if missing else "unknown key"
            )
        case "missing":
            message = "missing"
        case "dataclass_type":
            message = f"{value!r} is not a mapping (a number is {{value, source, kind}})"
        case "value_error":
            message = message.removeprefix("Value error, ")
        case _:
            message = f"{message} (found {value!r})"
    return Fault(path=_dotted(place), message=message)


def _is_missing_beside(detail: "ErrorDetails", place: tuple[int | str, ...]) -> bool:
    return detail["type"] == "missing" and detail["loc"][:-1] == place[:-1]


def _dotted(place: tuple[int | str, ...]) -> str:
    """Path of a fault, such as laws[0].launch_s; "." is the file itself."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(parts).removeprefix(".") or "."
