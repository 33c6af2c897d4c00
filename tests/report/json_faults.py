"""Whether an object that a command printed is what its schema says."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mist.plans.plan import Plan
from mist.report.json_schemas import PLAN, RESULTS, PlanMore


def faults_of(data: Mapping[str, Any]) -> str:
    """What of an object that a command printed its schema does not allow; "" where it is right."""
    name = str(data["schema"])
    try:
        if name != PLAN:
            TypeAdapter(RESULTS[name]).validate_python(data)
        else:
            more = {key: value for key, value in data.items() if key in PlanMore.__annotations__}
            TypeAdapter(PlanMore).validate_python(more)
            file = {key: value for key, value in data.items() if key not in more}
            TypeAdapter(Plan).validate_python(file)
    except ValidationError as error:
        return str(error)
    return ""
