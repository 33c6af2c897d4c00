"""The trace of a step against the format that Perfetto reads, and against the plan."""

import json

from mist.report.chrome_trace import trace_of
from tests.report.sample_reports import sample_report


def test_events_are_complete_and_add_up() -> None:
    report = sample_report()
    assert report.judgement is not None
    trace = json.loads(json.dumps(trace_of(report.plan, report.judgement.paces)))
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {0: "stage 0", 1: "network of 0", 2: "stage 1", 3: "network of 1"}
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["tid"] for e in events} == set(names)
    assert all(e["ts"] >= 0 and e["dur"] > 0 for e in events)
    # Stage 1: eight micro-batches of 0.25 s and 0.25 s once, in microseconds.
    assert round(sum(e["dur"] for e in events if e["tid"] >= 2)) == 2_250_000
