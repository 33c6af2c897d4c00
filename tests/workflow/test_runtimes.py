"""Every runtime that ships plans, or says what it has; what it plans, `mist check` judges alike."""

from pathlib import Path

import pytest

from mist.errors import InputError
from mist.graph import ModelGraph
from mist.planfile import save_plan
from mist.platform.profiles import load_runtime
from mist.spaces import SearchSpace, narrowed, space_of
from mist.spec import MemoryLevel, ScheduleKind
from mist.workflow.checking import HandLayout, check_layout, check_plan
from mist.workflow.planning import make_plan
from mist.workflow.question import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

RUNTIMES = sorted(path.stem for path in Path("profiles/runtimes").glob("*.yaml"))
GRAPHS = {
    "like": toy_graph((8,)),
    "tied": toy_graph((3, 2), vocab=8192, tied=True),  # two kinds of layers, five in all
}
EAGER = {level: "eager" for level in MemoryLevel}


def asked(runtime: str, num_gpus: int = 4, **changes: object) -> Question:
    several = load_runtime(runtime).profile.knobs.data_parallel
    return Question(
        model="toy.py",
        num_gpus=num_gpus if several else 1,
        runtime=runtime,
        seq_len=2048,
        global_batch=16,
        **changes,  # type: ignore[arg-type]
    )


def test_ten_runtimes_ship() -> None:
    assert len(RUNTIMES) == 10


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_runtime_plans_what_it_can_run(
    runtime: str, graph: ModelGraph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer_with(graph, monkeypatch)
    planned = make_plan(asked(runtime), SearchSpace())
    knobs = load_runtime(runtime).profile.knobs
    assert planned.points, "the cloud of the picture is empty"
    assert {stage.zero for stage in planned.plan.stages} <= {*knobs.zero_levels}
    for layout in planned.points:
        assert len(layout.stages) == 1 or layout.schedule.kind in knobs.schedules
        assert {stage.zero for stage in layout.stages} <= {*knobs.zero_levels}
    save_plan(planned.plan, tmp_path / "plan.yaml")
    assert check_plan(tmp_path / "plan.yaml").plan == planned.plan
