"""Recipes of docs/extending.md, each followed with the files that it names and no others."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mist
from mist.plans.search_space import SearchSpace
from mist.workflow.planning import Planned, make_plan
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
PROFILES = ROOT / "profiles"


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of profiles, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "mist" / "profiles"


def copied(profiles: Path, nearest: str, name: str, *changes: tuple[str, str]) -> None:
    """The nearest shipped file under another name, with lines changed."""
    text = (PROFILES / nearest).read_text()
    for pattern, new in ((r"^name: .*$", f"name: {name}"), *changes):
        text, count = re.subn(f"(?m){pattern}", new, text)
        assert count == 1, pattern
    path = profiles / Path(nearest).parent / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def planned(**options: object) -> Planned:
    """A plan of the toy for two GPUs."""
    question = Question(model="toy", num_gpus=2, seq_len=2048, global_batch=16, **options)  # type: ignore[arg-type]
    return make_plan(question, SearchSpace(tp=(1,)))


@pytest.mark.slow
def test_a_gpu(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    quick = r"^tensor_time_scale: \{value: 1.0", "tensor_time_scale: {value: 0.5"
    box = r"^default_cluster: .*$", "default_cluster: mi301x-box"
    own = r"^devices: .*$", "devices: [mi301x]"
    copied(profiles, "devices/mi300x.yaml", "mi301x", box)
    copied(profiles, "clusters/mi300x-box.yaml", "mi301x-box", own)
    as_mi300x = planned(gpu="mi301x").plan
    assert (as_mi300x.cluster.device, as_mi300x.cluster.name) == ("mi301x", "mi301x-box")
    assert as_mi300x.estimate.step_s == planned(gpu="mi300x").plan.estimate.step_s
    copied(profiles, "devices/mi300x.yaml", "mi301x", box, quick)
    assert planned(gpu="mi301x").plan.estimate.step_s < as_mi300x.estimate.step_s


@pytest.mark.slow
def test_a_cluster(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    copied(profiles, "clusters/l4-box.yaml", "mine", (r"value: 3.84e\+11", "value: 1.0e+11"))
    plan = planned(gpu="l4", cluster="mine").plan
    assert (plan.cluster.device, plan.cluster.name) == ("l4", "mine")


def test_a_runtime(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    copied(
        profiles, "runtimes/torch.yaml", "mine", (r"^  zero_levels: \[.*\]", "  zero_levels: [3]")
    )
    plan = planned(gpu="l4", runtime="mine").plan
    assert plan.runtime == "mine"
    assert {stage.zero for stage in plan.stages} == {3}


NEW_OBJECTIVE = {
    r'(class Objective\(StrEnum\):\n    """.*?""")': r'\1\n\n    FEWEST_GPUS = "fewest-gpus"',
    r"(OBJECTIVES: .*?MappingProxyType\(\n    \{)": r"\1\n        Objective.FEWEST_GPUS: "
    "ObjectiveRow(cost=lambda candidate: candidate.num_gpus),",
}
CHOOSE = """
import sys

import pytest

from mist.plans.objectives import Objective
from mist.plans.search_space import SearchSpace
from mist.workflow.cluster_choice import offer_of, rent
from mist.workflow.planning import Effort
from mist.workflow.request import Question

sys.path.append(sys.argv[1])
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

answer_with(toy_graph(), pytest.MonkeyPatch())
question = Question(model="toy", num_gpus=8, seq_len=2048, global_batch=16)
for objective in (Objective.THROUGHPUT, Objective("fewest-gpus")):
    offer = offer_of("4,2,8", None, None, None)
    rented = rent(question, offer, SearchSpace(tp=(1,)), Effort(objective=objective))
    print(rented.planned.plan.cluster.num_gpus)
"""


def copied_package(folder: Path, recipe: int, edits: dict[str, dict[str, str]]) -> None:
    """A copy of the package with edits (pattern, new text) of files that a recipe names.

    No enumeration takes a member at run time.
    """
    shutil.copytree(ROOT / "mist", folder / "mist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROFILES, folder / "profiles")
    words = PAGE.split(f"\n## {recipe}.")[1].split("\n## ")[0]
    for name, changes in edits.items():
        assert f"`{name}`" in words
        text = (folder / name).read_text()
        for pattern, new in changes.items():
            text, count = re.subn(f"(?s){pattern}", new, text, count=1)
            assert count == 1, pattern
        (folder / name).write_text(text)


def printed(folder: Path, script: str) -> list[str]:
    """What a script prints that runs with the copied package."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_an_objective(tmp_path: Path) -> None:
    copied_package(tmp_path, 7, {"mist/plans/objectives.py": NEW_OBJECTIVE})
    assert printed(tmp_path, CHOOSE) == ["8", "2"]


@pytest.mark.slow
def test_a_model_family(tmp_path: Path) -> None:
    """A file of the user: parallel branches, no attention, layers in a list of another name."""
    path = tmp_path / "branches.py"
    path.write_text(MODEL)
    judged = mist.check(str(path), gpus=2, gpu="l4", seq=64, global_batch=4, zero=2)
    assert judged.fits
    assert judged.plan.stages[0].num_layers == 3


MODEL = """
import torch
from torch import nn


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + torch.tanh(self.left(x)) * torch.sigmoid(self.right(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.trunk = nn.ModuleList(Branches() for _ in range(3))
        self.out = nn.Linear(32, 100)

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.trunk:
            x = layer(x)
        return self.out(x)


def build_model():
    return Net()
"""


NEW_LEVEL = {
    "mist/plans/workload.py": {
        r'(    SELECTIVE = "selective"\n)': r'\1    INPUTS = "inputs"\n',
    },
    "mist/plans/memory_levels.py": {
        r"(        MemoryLevel.FULL: LevelRow)": r"        MemoryLevel.INPUTS: "
        r'LevelRow(repeats="part", meaning="keeps_results", product_stride=0),\n\1',
    },
}
NEW_SCHEDULE = {
    "mist/plans/workload.py": {
        r'(    ZERO_BUBBLE = "zero-bubble"\n)': r'\1    ONE_AHEAD = "one-ahead"\n',
    },
    "mist/plans/schedules.py": {
        r"(        ScheduleKind.INTERLEAVED: ScheduleRow)": r"        ScheduleKind.ONE_AHEAD: "
        r"ScheduleRow(forwards=lambda turns, behind, stages, step: behind + 2),\n\1",
    },
    "mist/exec/build/pipeline.py": {
        r"(    ScheduleKind.ONE_F_ONE_B: Schedule1F1B,\n)": r"\1"
        r"    ScheduleKind.ONE_AHEAD: Schedule1F1B,\n",
    },
    "profiles/runtimes/torch.yaml": {r"(schedules: \[)": r"\1one-ahead, "},
}
PLAN = """
import sys

import pytest

from mist.plans.search_space import narrowed, space_of
from mist.workflow.planning import make_plan
from mist.workflow.request import Question

sys.path.append(sys.argv[1])
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

answer_with(toy_graph(), pytest.MonkeyPatch())
question = Question(model="toy", num_gpus=2, seq_len=2048, global_batch=16)
fixed = {fixed}
space = narrowed(space_of("3d"), fixed=fixed, most=(), forbid=())
plan = make_plan(question, space).plan
print(plan.schedule.kind, *[stage.levels[0].value for stage in plan.stages])
"""


@pytest.mark.slow
def test_a_memory_level(tmp_path: Path) -> None:
    copied_package(tmp_path, 4, NEW_LEVEL)
    script = PLAN.replace("{fixed}", '["tp=1", "pp=1", "checkpoint=inputs"]')
    assert printed(tmp_path, script) == ["1f1b", "inputs"]


@pytest.mark.slow
def test_a_schedule(tmp_path: Path) -> None:
    copied_package(tmp_path, 6, NEW_SCHEDULE)
    script = PLAN.replace("{fixed}", '["tp=1", "pp=2", "schedule=one-ahead"]')
    assert printed(tmp_path, script)[0] == "one-ahead"


NEW_OPTIMIZER = {
    "mist/plans/workload.py": {
        r'(    ADAMW = "adamw"\n)': r'\1    LION = "lion"\n',
    },
    "profiles/runtimes/torch.yaml": {
        r"(\n  moments:\n)": r"\1    - {bytes_per_param: {value: 4.0, source: one, kind: spec}, "
        r"sharded_from: 1, optimizers: [lion]}\n",
    },
    "mist/workflow/request.py": {r"(optimizer: Optimizer = Optimizer).ADAMW": r"\1.LION"},
}
STATES = """
import sys

import pytest

from mist.errors import PlatformError
from mist.plans.search_space import narrowed, space_of
from mist.plans.workload import Optimizer
from mist.workflow import request
from mist.workflow.planning import make_plan
from mist.workflow.request import Question

sys.path.append(sys.argv[1])
from tests.toys import toy_graph

pytest.MonkeyPatch().setattr(request, "_trace_module", lambda *asked: toy_graph())
space = narrowed(space_of("3d"), fixed=["tp=1", "pp=1", "zero=0"], most=(), forbid=())
asked = {"model": object(), "num_gpus": 1, "seq_len": 2048, "global_batch": 16}
states = []
for optimizer in ({}, {"optimizer": Optimizer.ADAMW}):
    plan = make_plan(Question(**asked, **optimizer), space).plan
    states.append(plan.estimate.stages[0].memory_parts_bytes["states"])
    print(plan.workload.optimizer)
print((states[1] - states[0]) / toy_graph().num_params)
try:
    make_plan(Question(**asked, runtime="megatron"), space)
except PlatformError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_optimizer(tmp_path: Path) -> None:
    """One moment in place of AdamW's two: 4 bytes a parameter less."""
    copied_package(tmp_path, 8, NEW_OPTIMIZER)
    first, second, difference, *refusal = printed(tmp_path, STATES)
    assert (first, second, float(difference)) == ("lion", "adamw", pytest.approx(4.0, rel=1e-6))
    assert " ".join(refusal) == (
        "optimizer lion: runtime megatron has states of adamw only. "
        "Add a row to `moments` of its profile."
    )


NEW_KNOB = {
    "mist/plans/knobs.py": {
        r'(    Knob\(name="cp",)': r'    Knob(name="streams", word="streams", meaning="New."),\n\1',
    },
    "mist/plans/plan.py": {
        r"(    dp_replicate: \w+ = 1\n)": r"\1    streams: PositiveInt = 1\n",
    },
}
CHECK = """
import sys

import pytest
import typer.main

from mist.cli.application import app
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question

sys.path.append(sys.argv[1])
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

answer_with(toy_graph(), pytest.MonkeyPatch())
question = Question(model="toy", num_gpus=2, seq_len=2048, global_batch=16)
(option,) = [
    each for each in typer.main.get_command(app).commands["check"].params if each.name == "streams"
]
print(*option.opts, check_layout(question, HandLayout(streams=2)).plan.stages[0].streams)
"""


@pytest.mark.slow
def test_a_knob(tmp_path: Path) -> None:
    copied_package(tmp_path, 5, NEW_KNOB)
    assert printed(tmp_path, CHECK) == ["--streams", "2"]
