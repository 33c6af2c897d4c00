"""Plan files: YAML, read with every fault reported at once, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from mist.errors import Fault, InputError, OutputError, PlanError
from mist.plans import SCHEMA, Plan, plan_faults


def load_plan(path: str | Path) -> Plan:
    """The plan in a file.

    Raises InputError when the file cannot be read and PlanError with every fault and its path.
    """
    data = _read(Path(path))
    faults = [*_schema_faults(data), *plan_faults(data)]
    if faults:
        raise PlanError(str(path), faults)
    return _adapter().validate_json(json.dumps(data), strict=True)


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan file; the file appears whole or not at all.

    Raises OutputError when the folder is missing or not writable.
    """
    write_text(Path(path), dump_plan(plan))


def dump_plan(plan: Plan) -> str:
    """The plan as YAML text; the same plan gives the same bytes."""
    data = json.loads(json.dumps(asdict(plan)))
    text = yaml.dump(data, Dumper=_PlanDumper, sort_keys=False, width=100, default_flow_style=None)
    return str(text)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one in the same folder. Raises OutputError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one in the same folder. Raises OutputError."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror}. Choose another --out."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror}. Choose another --out."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _read(path: Path) -> Mapping[str, object]:
    try:
        data = yaml.load(path.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the plan {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"{path} is not a plan: it has no {SCHEMA} mapping.")
    return data


def _schema_faults(data: Mapping[str, object]) -> list[Fault]:
    """Faults of names and types; those of the invariants come from plan_faults."""
    try:
        _adapter().validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        rows = error.errors(include_url=False, include_context=False)
        return [
            Fault(path=_path(row["loc"]), message=_message(row["type"], row["msg"])) for row in rows
        ]
    except PlanError:
        return []
    return []


def _message(kind: str, message: str) -> str:
    """Pydantic's words, without its own vocabulary."""
    known = {"unexpected_keyword_argument": "unknown key", "missing": "missing"}
    return known.get(kind, message[0].lower() + message[1:])


def _path(location: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.lstrip(".") or "plan"


def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _PlanDumper(yaml.SafeDumper):
    """Small mappings and lists of numbers on one line, the rest as blocks, no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True
