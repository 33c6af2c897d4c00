"""Which platform the options name, and what they refuse."""

import subprocess
import sys
from pathlib import Path

import pytest

from mist.errors import PlatformError
from mist.plans.provenance import Kind
from mist.platform import Platform, Quantity, load_platform
from mist.platform.overrides import HOST_MEMORY
from tests.platform.samples import DEVICES, ROOT, RUNTIMES, other_one


def platform(num_gpus: int, gpu: str | None = None, cluster: str | None = None) -> Platform:
    return load_platform(num_gpus=num_gpus, gpu=gpu, cluster=cluster, runtime="torch")


@pytest.mark.parametrize(
    ("gpu", "cluster", "expected"),
    [
        (None, None, ("h100-sxm", "dgx-h100")),
        ("l4", None, ("l4", "l4-box")),
        (None, "dgx-a100", ("a100-sxm-80", "dgx-a100")),
        ("a100-sxm-40", "dgx-a100", ("a100-sxm-40", "dgx-a100")),
    ],
)
def test_what_is_not_named_follows(
    gpu: str | None, cluster: str | None, expected: tuple[str, str]
) -> None:
    found = platform(8, gpu, cluster)
    assert (found.device.name, found.cluster.name) == expected


@pytest.mark.parametrize("gpu", DEVICES)
def test_every_device_loads_alone(gpu: str) -> None:
    assert platform(1, gpu).num_nodes == 1


@pytest.mark.parametrize(
    ("num_gpus", "num_nodes", "per_node"), [(1, 1, 1), (3, 1, 3), (8, 1, 8), (16, 2, 8), (64, 8, 8)]
)
def test_jobs_fill_whole_nodes(num_gpus: int, num_nodes: int, per_node: int) -> None:
    found = platform(num_gpus)
    assert (found.num_nodes, found.gpus_per_node) == (num_nodes, per_node)


@pytest.mark.parametrize(
    ("num_gpus", "gpu", "cluster", "message"),
    [
        (0, None, None, "--gpus 0: a plan needs at least one GPU. Try --gpus 8."),
        (-1, None, None, "--gpus -1: a plan needs at least one GPU. Try --gpus 8."),
        (
            17,
            None,
            None,
            "--gpus 17: dgx-h100 has 8 GPUs per node, so a job takes at most 8 GPUs or a multiple "
            "of 8. Try --gpus 16 or 24.",
        ),
        (
            9,
            "cpu",
            None,
            "--gpus 9: local-cpu has at most 8 GPUs (nodes: 1, GPUs per node: 8). Try --gpus 8.",
        ),
        (
            8,
            "H100",
            None,
            "--gpu H100: more than one device is called so. "
            "Give h100-pcie or h100-sxm or h100-sxm-500w-hbm2e.",
        ),
        (
            8,
            "hx00",
            None,
            "--gpu hx00: no device of that name. Did you mean h200 or gh200 or h20? "
            f"{other_one('device')}",
        ),
        (
            8,
            None,
            "dgx-h10",
            "--cluster dgx-h10: no cluster of that name. Did you mean dgx-h100 or dgx-h200 or "
            f"hgx-h20? {other_one('cluster')}",
        ),
        (
            8,
            "l4",
            "dgx-h100",
            "--gpu l4: cluster dgx-h100 holds h100-sxm or h100-sxm-500w-hbm2e. "
            "Try --cluster l4-box.",
        ),
        (8, "./mine.yaml", None, "--gpu ./mine.yaml: no such file."),
    ],
)
def test_what_cannot_be_is_refused(
    num_gpus: int, gpu: str | None, cluster: str | None, message: str
) -> None:
    with pytest.raises(PlatformError) as refusal:
        platform(num_gpus, gpu, cluster)
    assert str(refusal.value) == message
    assert refusal.value.exit_code == 2


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(PlatformError) as refusal:
        load_platform(num_gpus=8, gpu=None, cluster=None, runtime="tensorflow")
    assert str(refusal.value) == (
        f"--runtime tensorflow: no runtime of that name. Known: {', '.join(RUNTIMES)}. "
        f"{other_one('runtime')}"
    )


def test_a_device_can_be_given_as_a_path() -> None:
    path = ROOT / "profiles" / "devices" / "l4.yaml"
    assert platform(8, str(path)) == platform(8, "l4")


def test_memory_from_total_to_planned() -> None:
    # 79.11 GiB reported, 1 GiB of context, and 12 % of the rest as margin.
    h100 = platform(8)
    assert h100.usable_bytes / 2**30 == pytest.approx(78.11)
    assert h100.planned_bytes(h100.margin_ratio) / 2**30 == pytest.approx(67.02, abs=0.01)
    assert h100.planned_bytes(0.0) == h100.usable_bytes


def test_a_margin_is_a_ratio() -> None:
    with pytest.raises(PlatformError) as refusal:
        platform(8).planned_bytes(12)
    assert str(refusal.value) == "--margin 12: a margin is a ratio from 0 up to 1. Try 0.15."


def test_a_device_without_measurements_is_less_certain() -> None:
    known = load_platform(num_gpus=8, gpu="l40s", cluster=None, runtime="deepspeed-zero3")
    errors = [each.step_error for each in (known, platform(8, "cpu"))]
    assert [error.value for error in errors if isinstance(error, Quantity)] == [0.25, 0.4]
    assert platform(8).memory_uncertainty_ratio == 0.1


def test_hashes_name_the_profiles_and_the_calibration() -> None:
    hashes = platform(8).profile_hashes()
    assert list(hashes) == ["h100-sxm", "dgx-h100", "torch", "torch-h100-sxm"]
    assert all(value.startswith("sha256:") and len(value) == 71 for value in hashes.values())


def test_the_room_imports_no_heavy_package() -> None:
    heavy = "('torch', 'sympy', 'yaml')"
    code = f"import sys, mist.platform; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("gpu", "cluster", "num_bytes", "kind"),
    [
        ("a100-sxm-80", "dgx-a100", 2e12, Kind.SPEC),  # its source: 2 TB with 80 GB cards
        ("a100-sxm-40", "dgx-a100", 1e12, Kind.SPEC),  # and 1 TB with 40 GB
        ("a100-sxm-40", "aws-p4d", 1152 * 2**30, Kind.SPEC),
        ("h100-sxm", "aws-p5", 2 * 2**40, Kind.SPEC),
        ("a10g", "pcie-box", 768 * 2**30, Kind.SPEC),  # g5.48xlarge
        ("l40s", "pcie-box", 512e9, Kind.GUESS),
        ("rtx-4090", "pcie-box", 64e9, Kind.GUESS),
        ("rtx-4090", "one-gpu", 64e9, Kind.GUESS),
        ("l4", "one-gpu", 128e9, Kind.GUESS),
        ("gb200", "gb200-nvl72", 17e12 * 64 / 72, Kind.SPEC),  # a node is 64 of the 72
    ],
)
def test_host_memory_is_of_the_nodes_with_that_device(
    gpu: str, cluster: str, num_bytes: float, kind: Kind
) -> None:
    found = platform(1, gpu, cluster).host_memory
    assert found.value == pytest.approx(num_bytes, rel=1e-4)
    assert found.kind is kind


def test_the_users_host_memory_comes_first() -> None:
    found = load_platform(
        num_gpus=8, gpu="l4", cluster=None, runtime="torch", overrides={HOST_MEMORY: 31e9}
    )
    assert (found.host_memory.value, found.host_memory.kind) == (31e9, Kind.GIVEN)
    assert found.planned_host_bytes(0.2) == pytest.approx(31e9 * 0.8 / 8)
    assert found.hashes == platform(8, "l4").hashes


def test_host_memory_of_a_device_that_is_not_there(tmp_path: Path) -> None:
    text = (ROOT / "profiles/clusters/dgx-a100.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("  a100-sxm-40: {value", "  h100-sxm: {value"))
    with pytest.raises(PlatformError) as refusal:
        platform(8, None, str(path))
    assert str(refusal.value) == (
        f"{path} has 1 fault:\n  .: host_memory_by_device names ['h100-sxm'], which are not in "
        "devices"
    )
