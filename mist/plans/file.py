"""Plan files: YAML, read with every fault reported at once, written whole or not at all."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mist.documents import Document, parse_yaml, refuse_other_kind
from mist.errors import Fault, InputError, PlanError
from mist.files import read_bytes, write_text
from mist.plans.invariants import plan_faults
from mist.plans.plan import SCHEMA, Plan

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def load_plan(path: str | Path) -> Plan:
    """The plan in a file.

    Raises InputError when the file cannot be read and PlanError with every fault and its path.
    """
    document = parse_yaml(read_bytes(Path(path)), Path(path))
    if not isinstance(document, Document):
        raise InputError(f"{path} is not a plan: it has no {SCHEMA} mapping.")
    data = document.data
    refuse_other_kind(data, SCHEMA, Path(path))
    repeated = (Fault(path=key, message="given twice") for key in document.repeated)
    faults = [*repeated, *_schema_faults(data), *plan_faults(data)]
    if faults:
        raise PlanError(str(path), faults)
    # Through JSON text, because strict validation of Python objects refuses a list for a tuple and
    # a string for an enum.
    return _adapter().validate_json(json.dumps(data), strict=True)


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan file; the file appears whole or not at all.

    Raises OutputError when the folder is missing or not writable.
    """
    write_text(Path(path), dump_plan(plan))


def dump_plan(plan: Plan) -> str:
    """The plan as YAML text; the same plan gives the same bytes."""
    text = yaml.dump(
        plain_data(plan), Dumper=_PlanDumper, sort_keys=False, width=100, default_flow_style=None
    )
    return str(text)


def plain_data(plan: Plan) -> dict[str, object]:
    """The fields of a plan as JSON has them, without what a plan file leaves out."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    for stage, planned in zip(data["stages"], plan.stages, strict=True):
        if planned.dp_replicate == 1:
            del stage["dp_replicate"]
    # What says nothing is left out.
    for name in ("overrides", "robustness"):
        if not data[name]:
            del data[name]
    if plan.workload.images is None:
        del data["workload"]["images"]
    if plan.model.trainable is None:
        del data["model"]["trainable"]
    return data


def _schema_faults(data: Mapping[str, object]) -> list[Fault]:
    """Faults of names and types; those of the invariants come from plan_faults."""
    try:
        _adapter().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        rows = error.errors(include_url=False, include_context=False)
        return [Fault(path=_path(row["loc"]), message=_message(row)) for row in rows]
    except PlanError:
        return []
    return []


def _message(row: "ErrorDetails") -> str:
    """Pydantic's words and what was found, without its own vocabulary."""
    known = {"unexpected_keyword_argument": "unknown key", "missing": "missing"}
    if row["type"] in known:
        return known[row["type"]]
    message, found = row["msg"][0].lower() + row["msg"][1:], row["input"]
    told = isinstance(found, str | int | float | None)
    return f"{message} (found {json.dumps(found)})" if told else message


def _path(location: tuple[int | str, ...]) -> str:
    """Like `stages[1].offload.weights`; pydantic marks a fault in a key itself with "[key]"."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return "".join(steps).removesuffix(".[key]").lstrip(".") or "plan"


@cache
def _adapter() -> TypeAdapter[Plan]:
    """What checks plans: slow to make."""
    return TypeAdapter(Plan)


class _PlanDumper(yaml.SafeDumper):
    """Small mappings and lists of numbers on one line, the rest as blocks, no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True
