"""One step as a trace that Perfetto and chrome://tracing open: a track for each stage and stream.

Format: Trace Event Format, complete events ("ph": "X") with times in microseconds.
"""

from collections.abc import Sequence

from mist.plans.plan import Plan
from mist.report.judgement_pictures import step_picture
from mist.report.pictures import HALF_ROW
from mist.report.step_timeline import StagePace, timeline
from mist.units import MICROSECOND


def trace_of(plan: Plan, paces: Sequence[StagePace]) -> dict[str, object]:
    """The passes of the timeline of a report, as a JSON object."""
    picture = step_picture(plan, paces, timeline(plan.layout, paces))
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": name}}
        for row, name in enumerate(picture.row_names)
    ]
    for shape in picture.shapes:
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": round(shape.y1 + HALF_ROW),
                "name": shape.series,
                "ts": shape.x1 / MICROSECOND,
                "dur": (shape.x2 - shape.x1) / MICROSECOND,
                "args": {"what": shape.words},
            }
        )
    return {
        # First, so that a command knows the file by its beginning.
        "otherData": {"writer": "mist report", "plan": plan.model.name},
        "displayTimeUnit": "ms",
        "traceEvents": events,
    }
