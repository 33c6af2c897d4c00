"""Plan files: YAML, read with every fault reported at once, written whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

from mist.errors import Fault, InputError, PlanError
from mist.files import write_text
from mist.plans.invariants import plan_faults
from mist.plans.plan import SCHEMA, Plan

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def load_plan(path: str | Path) -> Plan:
    """The plan in a file.

    Raises InputError when the file cannot be read and PlanError with every fault and its path.
    """
    data, repeated = _read(Path(path))
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
    if not plan.overrides:
        del data["overrides"]
    if plan.model.trainable is None:
        del data["model"]["trainable"]
    return data


def _read(path: Path) -> tuple[Mapping[str, object], list[Fault]]:
    """The mapping in a file, and the keys that it gives twice (of which YAML keeps the last)."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"Cannot read the plan {path}: it is not a text file.") from error
    except OSError as error:
        raise InputError(f"Cannot read the plan {path}: {error.strerror}.") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        repeated = list(_repeated_keys(node, "", frozenset()))
        data = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a plan: it has no {SCHEMA} mapping.")
    return data, repeated


def _repeated_keys(node: yaml.Node | None, path: str, above: frozenset[int]) -> Iterator[Fault]:
    """Every key that a mapping at or below this node has twice. Raises YAMLError on a cycle."""
    # An alias may point to a node above it, and the walk would never end.
    if id(node) in above:
        raise yaml.YAMLError(f"{path.lstrip('.')} contains itself")
    above |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}[{index}]", above)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            here = f"{path}.{key.value}"
            if here in seen:
                yield Fault(path=here.lstrip("."), message="given twice")
            seen.add(here)
            yield from _repeated_keys(value, here, above)


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


def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


class _Loader(yaml.SafeLoader):
    """What JSON can say: no bytes, sets or pairs, and a date is text."""


def _as_text(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return str(node.value)


def _refuse(loader: yaml.SafeLoader, node: yaml.Node) -> NoReturn:
    message = f"a plan holds no {node.tag.rpartition(':')[2]}"
    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _as_text)
for _kind in ("binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _refuse)


class _PlanDumper(yaml.SafeDumper):
    """Small mappings and lists of numbers on one line, the rest as blocks, no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True
