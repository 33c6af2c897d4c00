"""GPUs and clusters that people have: found under the names that they write, and planned for."""

import pytest

from mist.plans.objectives import Objective
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.platform.profiles import load_device
from mist.workflow.planning import Effort, make_plan
from mist.workflow.request import Question
from tests.fast_cases import first_fast
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

PLAIN = SearchSpace(tp=(1,), pp=(1,), offload=NO_RATIOS, refines=False)  # the quickest search
NOMINAL = Effort(objective=Objective.NOMINAL)
# As people write it: the memory (GB) of the datasheet.
GPUS = {
    "V100-SXM2-16GB": 16, "V100-SXM2-32GB": 32, "V100 PCIe 16GB": 16, "V100 PCIe 32GB": 32,
    "T4": 16, "RTX 3090": 24, "RTX 4090": 24, "4070 Ti S": 16, "5090": 32, "A6000": 48, "A40": 48,
    "A10G": 24, "A30": 24, "L4": 24, "L40S": 48, "A800": 80, "H800": 80, "H20": 96, "GH200": 96,
    "H200": 141, "B200": 180, "B300": 288, "GB200": 186, "GB300": 288, "RTX PRO 6000": 96,
    "MI250X": 64, "MI300X": 192, "MI325X": 256, "MI350X": 288, "MI355X": 288,
    "A100 80GB PCIe": 80,
}  # fmt: skip


# Of each make and generation one.
FAST = ("V100 PCIe 16GB", "T4", "RTX 4090", "4070 Ti S", "A40", "H20", "GB300", "MI250X", "MI355X")


@pytest.mark.parametrize(
    "gpu", [pytest.param(gpu, marks=[] if gpu in FAST else [pytest.mark.slow]) for gpu in GPUS]
)
def test_a_small_job_is_planned(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    volta = gpu.startswith(("V100", "T4"))
    question = Question(
        model="toy",
        num_gpus=2,
        gpu=gpu,
        seq_len=2048,
        global_batch=16,
        precision="fp32" if volta else "bf16",
    )
    cluster = make_plan(question, PLAIN, NOMINAL).plan.cluster
    # What a driver reports is less than GB of the name, or GiB of it, by less than a tenth.
    memory_bytes = load_device(cluster.device).profile.memory_bytes.value
    assert 0.9 * GPUS[gpu] * 1e9 < memory_bytes <= GPUS[gpu] * 2**30


@pytest.mark.parametrize(
    ("gpu", "cluster"),
    first_fast(
        [
            ("V100-SXM2-32GB", "DGX-V100"),
            ("H100 80GB HBM3", "H100 RoCE"),
            ("MI300X", "MI300X"),
            ("V100-SXM2-32GB", "V100 Omni-Path"),
            ("A100-SXM4-80GB", "A100 Omni-Path"),
            ("A100-SXM4-80GB", "A100 RoCE"),
            ("H100 80GB HBM3", "H100 NDR"),
        ],
        3,
        width=2,
    ),
)
def test_a_job_of_two_nodes_is_planned(
    gpu: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(toy_graph(), monkeypatch)
    question = Question(
        model="toy",
        num_gpus=16,
        gpu=gpu,
        cluster=cluster,
        seq_len=2048,
        global_batch=64,
        precision="fp32" if gpu.startswith("V100") else "bf16",
    )
    plan = make_plan(question, PLAIN, NOMINAL).plan
    assert plan.cluster.num_gpus == 16 >= 2 * plan.cluster.gpus_per_node
