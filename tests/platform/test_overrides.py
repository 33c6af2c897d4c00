"""Figures that the user sets: what they mean, what is refused, and that they reach profiles."""

import pytest

from mist.errors import PlatformError
from mist.plans.provenance import Kind
from mist.platform import Platform, load_platform
from mist.platform.listing import figure_names, figures_of
from mist.platform.overrides import HOST_MEMORY, OWN, knobs_and_figures, overrides_of
from mist.units import GB, GIB


def platform(*words: str, gpu: str = "h100-sxm", num_gpus: int = 8) -> Platform:
    return load_platform(
        num_gpus=num_gpus, gpu=gpu, cluster=None, runtime="torch", overrides=overrides_of(words)
    )


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("cluster.host_memory_bytes=64GB", 64 * GB),
        ("cluster.host_memory_bytes=64 GiB", 64 * GIB),
        ("cluster.host_memory_bytes=6.4e10", 64 * GB),
        ("cluster.network.nic_bytes_per_s=100Gb/s", 12.5e9),  # gigabits
        ("cluster.network.nic_bytes_per_s=12.5GB/s", 12.5e9),
        ("cluster.network.hop_s=10us", 1e-5),
        ("device.gemm.bf16.peak_flop_per_s=71TFLOP/s", 71e12),
        ("runtime.memory.margin_ratio=0.05", 0.05),
    ],
)
def test_values_in_the_unit_of_their_key(word: str, value: float) -> None:
    (found,) = overrides_of([word]).values()
    assert found == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["cluster.network.hop_s=10Gb/s"],
            "--set cluster.network.hop_s=10Gb/s: expected a number, in s or with s, ms, us.",
        ),
        (
            ["cluster.network.nic_bytes_per_s=100gb/s"],  # bits or bytes?
            "--set cluster.network.nic_bytes_per_s=100gb/s: expected a number, in B/s or with "
            "GB/s, TB/s, GiB/s, Gb/s, Gbit/s.",
        ),
        (["device.memory_bytes"], "--set device.memory_bytes: expected a number, in B or with B."),
        (
            ["runtime.memory.margin_ratio=12%"],
            "--set runtime.memory.margin_ratio=12%: expected a number.",
        ),
        (
            ["device.memory_bytes=1GB", "device.memory_bytes=2GB"],
            "--set device.memory_bytes=2GB: device.memory_bytes is set twice.",
        ),
        (
            ["tp=2"],
            "--set tp=2: no figure of a profile. Its name begins with device., cluster., "
            "runtime.: --set cluster.host_memory_bytes=64GB.",
        ),
    ],
)
def test_words_that_set_nothing(words: list[str], message: str) -> None:
    with pytest.raises(PlatformError) as refused:
        overrides_of(words)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "cluster.host_memory_gb=64",
            "--set cluster.host_memory_gb: cluster dgx-h100 has no figure of that name. "
            "Did you mean cluster.host_memory_bytes? mist profiles show dgx-h100 lists them.",
        ),
        (
            "runtime.knobs.zero_levels=3",  # a setting, no figure
            "--set runtime.knobs.zero_levels: runtime torch has no figure of that name. "
            "mist profiles show torch lists them.",
        ),
        (
            "device.=3",
            "--set device.: device h100-sxm has no figure of that name. "
            "mist profiles show h100-sxm lists them.",
        ),
        # The same bounds as in a file.
        (
            "device.memory_bytes=-1",
            "--set device.memory_bytes=-1 has 1 fault:\n"
            "  memory_bytes: value -1.0 is not a finite number from 0 up",
        ),
        (
            "device.context_bytes=1e12",
            "--set device.context_bytes=1e+12 has 1 fault:\n"
            "  .: context_bytes leaves nothing of memory_bytes",
        ),
        (
            "cluster.gpus_per_node=2.5",
            "--set cluster.gpus_per_node=2.5 has 1 fault:\n"
            "  .: gpus_per_node and max_nodes must be whole numbers from 1 to 1048576, found 2.5",
        ),
    ],
)
def test_figures_that_cannot_be(word: str, message: str) -> None:
    with pytest.raises(PlatformError) as refused:
        platform(word)
    assert str(refused.value) == message


def test_every_ratio_can_be_set_alone() -> None:
    """Of every profile, wherever in it the figure stands."""
    plain = platform()
    profiles = {"device": plain.device, "cluster": plain.cluster, "runtime": plain.runtime}
    for family, profile in profiles.items():
        names = [name for name in figure_names(profile) if name.endswith("_ratio")]
        assert names
        for name in names:
            found = getattr(platform(f"{family}.{name}=0.37"), family)
            changed = {row.path: row.value for row in figures_of(found) if row.source == OWN}
            assert changed == {name: 0.37}


def test_what_was_null_can_be_set() -> None:
    with pytest.raises(PlatformError, match=r"dgx-h100 has at most 16 GPUs"):
        platform("cluster.max_nodes=2", num_gpus=24)


def test_nodes_of_another_size() -> None:
    assert platform("cluster.gpus_per_node=4").num_nodes == 2


def test_host_memory_of_a_device_gives_way_too() -> None:
    own = platform("cluster.host_memory_bytes=31GB", gpu="rtx-4090")
    assert (own.host_memory.value, own.host_memory.kind) == (31 * GB, Kind.GIVEN)


def test_a_users_figure_comes_after_calibration() -> None:
    """Megatron on H100 is calibrated; the user's word is of the machine at hand."""
    name = "device.tensor_time_scale"
    asked = {"num_gpus": 8, "gpu": "h100-sxm", "cluster": None, "runtime": "megatron"}
    plain = load_platform(**asked)  # type: ignore[arg-type]
    assert plain.device.tensor_time_scale.kind is Kind.CALIBRATED
    found = load_platform(**asked, overrides={name: 2.0})  # type: ignore[arg-type]
    assert found.device.tensor_time_scale.value == 2.0


def test_costs_of_another_runtime_are_compiled_anew() -> None:
    """Programs are kept by this digest: they have the runtime's figures in them, no others."""
    plain = platform()
    assert platform("device.memory_bytes=40GB").runtime_hash == plain.runtime_hash
    changed = platform("runtime.loading.part_bytes_per_param=8").runtime_hash
    assert changed != plain.runtime_hash
    assert changed != platform("runtime.loading.part_bytes_per_param=6").runtime_hash


def test_knobs_and_figures_are_told_apart() -> None:
    words = ["tp=2", f"{HOST_MEMORY}=1GB", "checkpoint=full", "runtime.x=1"]
    assert knobs_and_figures(words) == (["tp=2", "checkpoint=full"], [words[1], words[3]])


def test_a_switch_of_a_runtime() -> None:
    name, plain = "runtime.knobs.sequence_parallel", platform()
    off = platform(f"{name}=0")
    assert (plain.runtime.knobs.sequence_parallel, off.runtime.knobs.sequence_parallel) == (
        True,
        False,
    )
    assert off.runtime_hash != plain.runtime_hash
    with pytest.raises(PlatformError, match="sequence_parallel=2: it is a switch, 0 or 1"):
        platform(f"{name}=2")
