"""What `--json` of each command prints, as types: the schemas in docs/schema are made from them.

Every object begins with `schema`: a name and a version, which is raised where a field goes, or
comes to mean something else. Fields may be added within a version. Times are in s, sizes in bytes,
money in USD, ratios of 1.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NotRequired

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from mist.calibrate.run_comparison import StageStep
from mist.exec.observation import CollectiveComparison, Seen
from mist.plans.plan import OpCost, Plan, Uncertainty
from mist.plans.provenance import Kind
from mist.report.explanation import Explanation
from mist.report.side_by_side import ComparedSubject
from mist.validate.results import Score

_WHOLE: Final = ConfigDict(extra="forbid", strict=False)


class HostMemoryResult(TypedDict):
    """What the fullest node needs of its memory, and what there is."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    held_bytes: int
    loading_bytes: int | None
    drawn_bytes: int | None
    memory_bytes: int
    limit_bytes: int
    kind: Kind
    source: str
    needed_bytes: int
    fits: bool


class CandidateResult(TypedDict):
    """A number of GPUs of a cluster; null where a plan, a price or tokens are missing."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    num_gpus: int
    cluster: str
    device: str
    chosen: bool
    step_s: float | None
    tokens_per_s: float | None
    tokens_per_s_per_gpu: float | None
    scaling_ratio: float | None
    peak_bytes: float | None
    step_low_ratio: float | None
    step_high_ratio: float | None
    price_per_gpu_hour_usd: float | None
    price_source: str
    usd_per_million_tokens: float | None
    tokens: float | None
    tokens_s: float | None
    tokens_usd: float | None
    why: str


class PlanMore(TypedDict):
    """What `mist plan` prints beside the fields of the plan file."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    host_memory: HostMemoryResult
    seconds: dict[str, float]
    notes: list[str]
    candidates: list[CandidateResult]
    explanation: NotRequired[Explanation]


class StageResult(TypedDict):
    """One stage of a layout that was judged; the parts sum to the peak and to the stable time."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    peak_bytes: int
    host_bytes: int
    usable_bytes: int
    parts: dict[str, int]
    stable_s: float
    delta_s: float
    time_parts_s: dict[str, float]


class CheckResult(TypedDict):
    """`mist check`: a layout that was judged; `margin_bytes`: what the limit leaves."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    params: int
    overrides: dict[str, float]
    trainable_params: int
    fits: bool
    margin_bytes: int
    limit_bytes: int
    host_limit_bytes: int
    host_memory: HostMemoryResult
    step_s: float
    tokens_per_s: float
    mfu: float
    uncertainty: Uncertainty
    stages: list[StageResult]
    op_costs: list[OpCost]
    extrapolated: list[str]
    notes: list[str]
    not_modelled: list[str]


class StageVerifiedResult(TypedDict):
    """One stage of a dry run, with what was predicted of it."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    seen: Seen
    predicted_bytes: int
    predicted_host_bytes: int
    allowance_bytes: int
    usable_bytes: int
    collectives: list[CollectiveComparison]
    difference_ratio: float
    fits: bool
    agrees: bool


class VerifyResult(TypedDict):
    """`mist verify`: the dry run of a rank of each stage."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    fits: bool
    agrees: bool
    stages: list[StageVerifiedResult]


class BesideResult(TypedDict):
    """One figure, predicted and measured; the ratios are the ends of the stated interval."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    what: str
    unit: str
    predicted: float
    measured: float
    low_ratio: float
    high_ratio: float
    spread_ratio: float
    error_ratio: float
    is_within: bool


class CompareRunResult(TypedDict):
    """`mist compare PLAN LOG`: a plan and its run."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    figures: list[BesideResult]
    num_steps: int
    parts_s: dict[str, float]
    stage_steps: list[StageStep]
    stages: list[dict[str, list[dict[str, str | int]]]]


class CompareResult(TypedDict):
    """`mist compare A B ...`: columns in their order."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    subjects: list[ComparedSubject]


class ReportResult(TypedDict):
    """`mist report`: the files that were written, and the verdict in sentences."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    files: list[str]
    verdict: list[str]


class ExportResult(TypedDict):
    """`mist export`: files, losses by kind and field, and how the exported layout is judged."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    target: str
    files: list[str]
    losses: list[dict[str, str]]
    fits: bool | None
    unjudged: NotRequired[str]
    runtime: NotRequired[str]
    margin_bytes: NotRequired[int]
    step_s: NotRequired[float]


class ValidateResult(TypedDict):
    """`mist validate`: the scores of each source."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    sources: list[Score]


class TraceResult(TypedDict):
    """`mist trace`: distinct blocks; costs are expressions, or numbers at a point."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    name: str
    params: int
    trainable_params: int
    layers: int
    precision: str
    fingerprint: str
    at: dict[str, int] | None
    blocks: list[dict[str, Any]]
    notes: list[str]


class ConvertResult(TypedDict):
    """`mist convert`: what a memory level changes, module by module."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    level: str
    changes: list[dict[str, str]]
    left_alone: list[dict[str, str]]


class FigureResult(TypedDict):
    """A figure of a profile."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    path: str
    value: float
    unit: str
    kind: str
    source: str


class ProfileResult(TypedDict):
    """A profile with all its figures."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    name: str
    family: str
    what: str
    figures: list[FigureResult]


class ProfilesResult(TypedDict):
    """`mist profiles`: what is shipped, and how sure it is."""

    __pydantic_config__ = _WHOLE  # type: ignore[misc]
    schema: str
    profiles: list[ProfileResult]


PLAN: Final = "mist.plan/1"
RESULTS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "mist.check/1": CheckResult,
        "mist.verify/1": VerifyResult,
        "mist.compare/1": CompareResult,
        "mist.compare-run/1": CompareRunResult,
        "mist.report/1": ReportResult,
        "mist.export/1": ExportResult,
        "mist.validate/1": ValidateResult,
        "mist.trace/1": TraceResult,
        "mist.convert/1": ConvertResult,
        "mist.profiles/1": ProfilesResult,
    }
)
"""The type behind each `schema` but that of a plan, which is the plan file's with `PlanMore`."""


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a `schema`, as it is published."""
    if name != PLAN:
        return TypeAdapter(RESULTS[name]).json_schema(mode="serialization") | {"$id": name}
    file, more = (TypeAdapter(each).json_schema(mode="serialization") for each in (Plan, PlanMore))
    return {
        **file,
        "$id": name,
        "title": "PlanResult",
        "$defs": file["$defs"] | more["$defs"],
        "properties": file["properties"] | more["properties"],
        "required": [*file["required"], *more["required"]],
    }
