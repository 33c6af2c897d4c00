"""Names as people and drivers write them: what they stand for, and what is said where nothing."""

import pytest

from mist.errors import PlatformError
from mist.platform import load_platform
from mist.platform.profiles import Family, find_profile, list_profiles
from tests.platform.samples import DEVICES, other_one


# Names that nvidia-smi, rocm-smi and torch.cuda.get_device_name print, and people's own.
@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla V100-SXM2-32GB", "v100-sxm-32"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("NVIDIA A10G", "a10g"),
        ("h100 sxm5", "h100-sxm"),
        ("H100-SXM", "h100-sxm"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("V100-SXM2-16GB", "v100-sxm-16"),
        ("Tesla V100-PCIE-32GB", "v100-pcie-32"),
        ("a100-40gb", "a100-sxm-40"),
        ("CPU", "cpu"),
    ],
)
def test_a_device_as_it_is_written(written: str, name: str) -> None:
    assert find_profile(written, Family.DEVICE).stem == name


@pytest.mark.parametrize("family", [Family.DEVICE, Family.CLUSTER, Family.RUNTIME])
def test_every_name_in_capitals_and_with_blanks(family: Family) -> None:
    for name in list_profiles(family):
        assert find_profile(name.upper().replace("-", " "), family).stem == name


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("A100", "a100-pcie-80 or a100-sxm-40 or a100-sxm-80"),
        ("A100 80GB", "a100-pcie-80 or a100-sxm-80"),
        ("nvidia-a100", "a100-pcie-80 or a100-sxm-40 or a100-sxm-80"),
        ("V100 16GB", "v100-pcie-16 or v100-sxm-16"),
    ],
)
def test_names_of_several_devices(written: str, names: str) -> None:
    with pytest.raises(PlatformError) as refused:
        find_profile(written, Family.DEVICE)
    assert str(refused.value) == (
        f"--gpu {written}: more than one device is called so. Give {names}."
    )


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("RTX 3080", "Did you mean rtx-3090 or rtx-5090 or rtx-4090?"),
        ("gtx1080", "Did you mean rtx-5090 or rtx-4090 or rtx-3090?"),
        ("b100", "Did you mean b300 or b200?"),
        ("L40", "Did you mean l40s?"),
        ("A10", "Did you mean a10g?"),  # another card, so no more than a suggestion
        ("Tesla V100-SXM3-24GB", "Did you mean v100-sxm-32 or v100-sxm-16 or v100-pcie-32?"),
        ("NVIDIA H100 NVL", "Did you mean h100-sxm or h100-pcie or h200?"),
        ("80", "Did you mean h800-sxm or a800-sxm-80 or a100-sxm-80?"),
        ("", f"Known: {', '.join(DEVICES)}."),
    ],
)
def test_unknown_devices_by_their_family(written: str, hint: str) -> None:
    with pytest.raises(PlatformError) as refused:
        find_profile(written, Family.DEVICE)
    assert str(refused.value) == (
        f"--gpu {written}: no device of that name. {hint} {other_one('device')}"
    )


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("DGX-V100", "dgx-1-v100"),
        ("H100 NDR", "hgx-h100-ib"),
        ("H100 RoCE", "hgx-h100-roce"),
        ("A100 Omni-Path", "a100-omni-path"),
        ("MI300X", "mi300x-box"),
    ],
)
def test_a_cluster_as_it_is_written(written: str, name: str) -> None:
    assert find_profile(written, Family.CLUSTER).stem == name


def test_runtimes_by_what_they_are() -> None:
    with pytest.raises(PlatformError) as refused:
        find_profile("fsdp2", Family.RUNTIME)
    assert "Did you mean torchtitan or torch?" in str(refused.value)


def test_what_was_assumed_is_said() -> None:
    bare = load_platform(num_gpus=8, gpu="V100-32GB SXM", cluster=None, runtime="torch")
    assert bare.cluster.num_gpus_per_node == 8
    assert bare.assumed == (
        f"--gpu V100-32GB SXM is taken for v100-sxm-32 ({bare.device.what})",
        f"--cluster is not given: dgx-1-v100 is assumed ({bare.cluster.what})",
    )
    full = load_platform(num_gpus=8, gpu="h100-sxm", cluster="dgx-h100", runtime="torch")
    assert full.assumed == ()


@pytest.mark.parametrize("device", DEVICES)
def test_eight_of_a_device_stand_in_one_machine(device: str) -> None:
    """The default cluster is a node of the usual size, never as many machines as GPUs."""
    found = load_platform(num_gpus=8, gpu=device, cluster=None, runtime="torch")
    assert found.num_nodes == 1
