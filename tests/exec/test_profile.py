"""`mist profile`: what it writes is a profile of measured figures, and plans are made for it."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mist.cli import app
from mist.errors import InputError, MistError, PlatformError
from mist.exec.profiling import Request
from mist.plans.file import save_plan
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.plans.workload import Precision
from mist.platform import Kind, Quantity, load_platform
from mist.platform.cluster import CollectiveTable
from mist.platform.machine import Machine, dump_machine
from mist.platform.op_tables import OpTable
from mist.platform.profiles import check, find_machine, read_yaml
from mist.workflow.checking import question_of
from mist.workflow.planning import make_plan
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

# Counted, or nothing to measure on one machine; what follows from "the host is the device" is 0.
NOT_MEASURED = {"cluster.max_nodes"}
MAY_BE_ZERO = ("_ratio", "_launch_s", "_tokens")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of this machine, measured as briefly as can be."""
    out: Path = tmp_path_factory.mktemp("profile") / "here.yaml"
    run = CliRunner().invoke(app, ["profile", "--ranks", "2", "--seconds", "1", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert "plan for it with --cluster ./here.yaml --gpus 2" in run.output
    return out


@pytest.fixture
def machine(path: Path) -> Machine:
    found = find_machine(str(path))
    assert found is not None
    return found.profile


def figures(record: object, place: str) -> Iterator[tuple[str, Quantity]]:
    if isinstance(record, Quantity):
        yield place, record
    elif is_dataclass(record):
        for item in fields(record):
            yield from figures(getattr(record, item.name), f"{place}.{item.name}")
    elif isinstance(record, Mapping):
        for key, value in record.items():
            yield from figures(value, f"{place}.{key}")
    elif isinstance(record, tuple):
        for index, value in enumerate(record):
            yield from figures(value, f"{place}[{index}]")


@pytest.mark.slow
def test_every_figure_is_measured_and_positive(machine: Machine) -> None:
    parts = {"device": machine.device, "cluster": machine.cluster, "values": machine.values}
    found = {at: q for name, part in parts.items() for at, q in figures(part, name)}
    assert len(found) > 40
    assert {at for at, q in found.items() if q.kind is not Kind.MEASURED} == NOT_MEASURED
    zero = {at for at, q in found.items() if q.value <= 0}
    assert not {at for at in zero if not at.endswith(MAY_BE_ZERO)}


@pytest.mark.slow
def test_the_spread_is_told_with_the_figures_and_tables(machine: Machine) -> None:
    tables: list[OpTable | CollectiveTable] = [*machine.cluster.tables.values()]
    tables += [table for each in machine.device.tables.values() for table in each.values()]
    for each in (*tables, machine.device.kernel_launch_s, machine.cluster.p2p_in_node.latency_s):
        assert "middle half within" in each.source


@pytest.mark.slow
def test_collectives_cost_more_with_more_bytes(machine: Machine) -> None:
    for table in machine.cluster.tables.values():
        assert table.groups == (2,)
        # 32 MiB against 1 KiB: a thousand times the bytes is never as fast.
        assert table.rows[-1][1] > 2 * table.rows[0][1]


@pytest.mark.slow
def test_the_host_is_the_device(machine: Machine) -> None:
    names = ("host.launch_ahead_ratio", "overlap.zero_all_gather_ratio")
    assert [machine.values[f"runtime.{name}"].value for name in names] == [0.0, 0.0]


@pytest.mark.slow
def test_a_profile_survives_the_round_trip(machine: Machine, path: Path) -> None:
    data = read_yaml(dump_machine(machine).encode(), path)
    assert check(data, Machine, path) == machine


@pytest.mark.slow
def test_plans_are_made_for_it_and_found_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer_with(toy_graph((4,)), monkeypatch)
    (tmp_path / "toy.py").write_text("")
    question = Question(
        model=str(tmp_path / "toy.py"),
        num_gpus=2,
        cluster=str(path),
        seq_len=64,
        global_batch=8,
        precision=Precision.FP32,
    )
    plan = make_plan(question, SearchSpace(offload=NO_RATIOS)).plan
    assert (plan.cluster.name, plan.cluster.device) == ("here", "cpu-here")
    assert {row.what: row.how for row in plan.estimate.op_costs}["matrix products"] == "measured"
    saved = path.parent / "plan.yaml"
    save_plan(plan, saved)
    assert question_of(plan, saved, plan.model.source).cluster == str(path.absolute())
    assert question_of(plan, tmp_path / "plan.yaml", plan.model.source).cluster == "here"


@pytest.mark.slow
def test_another_gpu_is_refused(path: Path) -> None:
    with pytest.raises(PlatformError) as refused:
        load_platform(num_gpus=2, gpu="h100-sxm", cluster=str(path), runtime="torch")
    assert str(refused.value) == f"--gpu h100-sxm: {path} is of cpu-here. Leave --gpu out."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "--device tpu: this machine is measured as cpu or cuda."),
        ({"num_ranks": 3}, "--ranks 3 is no power of 2. Try 2."),
        ({"seconds": 0.0}, "--seconds 0 is not between 1 and 3600."),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        Request(**{"device": "cpu", "num_ranks": 2, "seconds": 5.0, **changes})  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.slow
def test_a_value_that_the_runtime_lacks_is_told(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(path.read_text().replace("runtime.host.layer_launch_s", "runtime.host.none"))
    with pytest.raises(MistError, match=r"has a value that is none: HostLaunch has no none\."):
        load_platform(num_gpus=2, gpu=None, cluster=str(broken), runtime="torch")
