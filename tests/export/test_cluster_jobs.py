"""Jobs for clusters: what they start, and where the plan's numbers are in them."""

import re
import shlex
from dataclasses import replace

import pytest
import yaml

from mist.export.cluster_jobs import accelerator
from mist.export.target import ExportSource
from mist.export.targets import target_named
from tests.sample_plans import sample_plan

# Nodes, then ranks on each.
LAUNCHED = {
    "torchrun": r"NNODES:-(\d+)}.*--nproc-per-node=(\d+)",
    "slurm": r"--nodes=(\d+).*--nproc-per-node=(\d+)",
    "kubernetes": r"numNodes: (\d+).*numProcPerNode: (\d+)",
    "skypilot": r"num_nodes: (\d+).*accelerators: H100:(\d+)",
}
SUBJECT = ExportSource(plan=sample_plan(), path="my plan.yaml", config={})


def test_a_train_job_has_the_nodes_and_the_command() -> None:
    (text,) = target_named("kubernetes").write(SUBJECT).files.values()
    assert "cluster.num_gpus 8, cluster.gpus_per_node 8" in text
    trainer = yaml.safe_load(text)["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 8)
    assert trainer["command"][-3:] == ["mist", "apply", "my plan.yaml"]
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": "8"}}


def test_a_task_has_the_accelerators_and_a_script() -> None:
    (text,) = target_named("skypilot").write(SUBJECT).files.values()
    task = yaml.safe_load(text)
    assert task["num_nodes"] == 1
    assert task["resources"] == {"accelerators": "H100:8"}
    words = shlex.split(task["run"])
    assert words[words.index("apply") + 1] == "my plan.yaml"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("h100-sxm", "H100"),
        ("a100-sxm-80", "A100-80GB"),
        ("a100-sxm-40", "A100"),
        ("l4", "L4"),
        ("h200-sxm", "H200"),
    ],
)
def test_devices_have_the_names_of_skypilot(device: str, name: str) -> None:
    assert accelerator(device) == name


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_launchers_start_as_many_ranks_as_the_plan_has(nodes: int, gpus_per_node: int) -> None:
    """All that a launcher's file says of a plan: its path, the nodes, and the ranks on each."""
    cluster = replace(SUBJECT.plan.cluster, gpus_per_node=gpus_per_node)
    subject = replace(SUBJECT, plan=replace(SUBJECT.plan, cluster=cluster))
    for name, pattern in LAUNCHED.items():
        (text,) = target_named(name).write(subject).files.values()
        assert "my plan.yaml" in text
        found = re.search(pattern, text, re.DOTALL)
        assert found is not None, name
        assert (int(found[1]), int(found[2])) == (nodes, gpus_per_node), name
