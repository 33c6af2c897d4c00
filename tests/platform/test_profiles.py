"""Profiles: every figure has an origin, and every fault of a file is named."""

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mist.errors import PlatformError
from mist.model.summary import Traffic
from mist.plans.provenance import Kind
from mist.plans.workload import Optimizer, Precision
from mist.platform.device import BandwidthRatios
from mist.platform.listing import figure_rows, profile_rows
from mist.platform.profiles import Family, list_profiles, load_cluster, load_device, load_runtime
from mist.platform.quantity import Quantity, unit_of_key
from mist.platform.states import sum_states
from tests.platform.samples import CLUSTERS, DEVICES, PROFILES

FILES = sorted(PROFILES.rglob("*.yaml"))
# Integers that name a thing rather than measure one.
LABELS = {"head_dim", "zero", "group", "zero_levels"}
LABELS |= {"sharded_from", "offered_from", "each_micro_batch_from"}  # ZeRO levels
RANGE = {"name", "paths", "kinds", "by", "ends", "most", "spread", "worse", "unless_contention"}
LABELS |= {"most_zero_with_tp", "partial_offload"}  # as well
LABELS |= {"covariance"}  # of values that have a source


def bare_numbers(node: object, path: str = "") -> Iterator[str]:
    """Paths of numbers that are neither a quantity's value, nor in a table, nor a label."""
    if isinstance(node, dict) and {"source", "kind"} <= node.keys():
        assert node["source"].strip(), path
        assert node["kind"] in set(Kind), path
        assert node.keys() - {"source", "kind"} in (
            {"value"},
            {"columns", "rows"},
            {"shares"},
            {"instead"},
            RANGE & node.keys(),
        ), path
    elif isinstance(node, dict) and not path and "source" in node:
        assert node["source"].strip()  # of all numbers in the file
    elif isinstance(node, dict):
        for key, item in node.items():
            if key not in LABELS:
                yield from bare_numbers(item, f"{path}.{key}")
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from bare_numbers(item, f"{path}[{index}]")
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_has_a_source_and_a_kind(path: Path) -> None:
    assert list(bare_numbers(yaml.safe_load(path.read_text()))) == []
    assert path.read_text().isascii()


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_a_cluster_that_holds_it(name: str) -> None:
    device = load_device(name).profile
    assert device.name == name
    assert name in load_cluster(device.default_cluster).profile.devices


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_holds_devices_that_ship(name: str) -> None:
    cluster = load_cluster(name).profile
    assert cluster.name == name
    assert set(cluster.devices) <= set(DEVICES)


def test_half_precisions_share_a_law() -> None:
    gemm = load_device("h100-sxm").profile.gemm
    assert gemm[Precision.FP16] == gemm[Precision.BF16]


def test_ratios_are_ratios() -> None:
    rows = [row for name in [*DEVICES, *CLUSTERS, "torch"] for row in figure_rows(name)]
    ratios = [row for row in rows if row.path.endswith("_ratio") or "bandwidth_ratio." in row.path]
    wrong = [row for row in ratios if row.path != "flash_attention.backward_ratio"]
    assert [row for row in wrong if row.value is None or row.value > 1] == []


def test_bandwidth_ratios_are_the_words_of_the_graph() -> None:
    assert {item.name for item in fields(BandwidthRatios)} == {word.value for word in Traffic}


@pytest.mark.parametrize(
    ("precision", "zero", "dp", "expected"),
    [
        # Live bytes per parameter counted on torch 2.13 FSDP2 with 4 fake ranks (AdamW, second
        # step, forward of the last micro-batch).
        (Precision.BF16, 0, 4, 18),
        (Precision.BF16, 1, 4, 9),
        (Precision.BF16, 2, 4, 6),
        (Precision.BF16, 3, 4, 4),
        (Precision.FP32, 0, 4, 20),
        (Precision.FP32, 1, 4, 11),
        (Precision.FP32, 2, 4, 8),
        (Precision.FP32, 3, 4, 4),
    ],
)
def test_states_of_torch(precision: Precision, zero: int, dp: int, expected: float) -> None:
    states = load_runtime("torch").profile.states_of(precision, Optimizer.ADAMW)
    assert sum_states(states, zero).bytes_per_param(dp) == expected


def test_the_hash_is_of_the_file() -> None:
    loaded = load_device("l4")
    content = (PROFILES / "devices" / "l4.yaml").read_bytes()
    assert loaded.sha256 == f"sha256:{hashlib.sha256(content).hexdigest()}"


def edited(tmp_path: Path, source: str, old: str, new: str) -> Path:
    """A copy of a shipped profile with one piece replaced."""
    text = (PROFILES / source).read_text()
    assert old in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("source", "old", "new", "fault"),
    [
        pytest.param(
            "devices/l4.yaml",
            "name: l4\n",
            "name: l4\ncolour: green\n",
            "colour: unknown key",
            id="unknown key",
        ),
        pytest.param(
            "clusters/l4-box.yaml",
            "  hop_s: {value: 5.0e-05",
            "  hop_s: {value: fast",
            "network.hop_s.value: Input should be a valid number, unable to parse string as a "
            "number (found 'fast')",
            id="no number",
        ),
        pytest.param(
            "devices/l4.yaml",
            "kind: measured}",
            "kind: measurd}",
            "memory_bytes.kind: Input should be 'spec', 'fit', 'calibrated', 'measured', 'guess' "
            "or 'given' (found 'measurd')",
            id="wrong kind",
        ),
        pytest.param(
            "devices/l4.yaml",
            "hbm_bytes_per_s: {value: 3.0e+11",
            "hbm_bytes_per_s: {value: -3.0e+11",
            "hbm_bytes_per_s: value -300000000000.0 is not a finite number from 0 up",
            id="negative",
        ),
        pytest.param(
            "devices/l4.yaml",
            'source: "NVIDIA datasheet L4", kind: spec}',
            'source: "", kind: spec}',
            "hbm_bytes_per_s: source is empty: say where the number comes from",
            id="no source",
        ),
        pytest.param(
            "devices/l4.yaml",
            "    - head_dim: 128",
            "    - head_dim: 64",
            "flash_attention: laws must rise in head_dim and be at least one, found [64, 64]",
            id="laws in order",
        ),
        pytest.param(
            "clusters/pcie-box.yaml",
            "  - group: 8",
            "  - group: 7",
            ".: all_gather has group sizes [2, 4, 7] in links and tables; it needs 2 to 8",
            id="group sizes",
        ),
        pytest.param(
            "clusters/pcie-box.yaml",
            "  - group: 8",
            "  - group: 2",
            ".: all_gather has a group size twice in links and tables: [2, 2, 4]",
            id="group twice",
        ),
        pytest.param(
            "clusters/pcie-box.yaml",
            "columns: [bytes, group_2_us]",
            "columns: [bytes, group_2_s]",
            'tables.all_gather: columns must be "bytes" and then "group_2_us", "group_4_us", ...',
            id="unit of a table",
        ),
        pytest.param(
            "clusters/l4-box.yaml",
            "gpus_per_node: {value: 8",
            "gpus_per_node: {value: 7.5",
            ".: gpus_per_node and max_nodes must be whole numbers from 1 to 1048576, found 7.5",
            id="half a GPU",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            "precisions: [fp32], zero_levels: [0, 1, 2]",
            "zero_levels: [0, 1, 2]",
            ".: states.weights has two rows for bf16 and adamw at ZeRO-0",
            id="state twice",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            "kind: measured}, sharded_from: 2}",
            "kind: measured}, sharded_from: 2, precisions: [bf16, fp32]}",
            ".: states.gradients lacks a row for fp16 and adamw at ZeRO-0",
            id="state lacking",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            ", optimizers: [adamw]",
            "",
            ".: states.moments must have rows, and each name its optimizers",
            id="moments of any optimizer",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            "  moments:\n",
            "  momenta:\n",
            "states.momenta.[key]: Input should be 'weights', 'master', 'gradients' or 'moments' "
            "(found 'momenta')",
            id="unknown item",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            "bytes_per_param: {value: 8.0",
            "bytes_per_param: {value: 0.0",
            "states.moments[0]: bytes_per_param is 0: with it, time would be infinite or none",
            id="state of no bytes",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            "optimizer: {items: [moments]",
            "optimizer: {items: [moments, master]",
            "offload: master would leave the device twice",
            id="offloaded twice",
        ),
        pytest.param(
            "runtimes/torch.yaml",
            "weights: {items: [master]",
            "weights: {items: [weights]",
            ".: offload.weights has nothing to offload in bf16 at ZeRO-3",
            id="nothing to offload",
        ),
    ],
)
def test_a_broken_profile_names_its_fault(
    tmp_path: Path, source: str, old: str, new: str, fault: str
) -> None:
    path = edited(tmp_path, source, old, new)
    load = {"devices": load_device, "clusters": load_cluster, "runtimes": load_runtime}
    with pytest.raises(PlatformError) as refusal:
        load[Path(source).parent.name](str(path))
    assert str(refusal.value) == f"{path} has 1 fault:\n  {fault}"


def test_a_key_without_its_unit_is_two_faults_that_explain_each_other(tmp_path: Path) -> None:
    path = edited(tmp_path, "devices/l4.yaml", "hbm_bytes_per_s:", "hbm:")
    with pytest.raises(PlatformError) as refusal:
        load_device(str(path))
    assert str(refusal.value) == (
        f"{path} has 2 faults:\n  hbm_bytes_per_s: missing\n"
        "  hbm: unknown key; missing here: hbm_bytes_per_s"
    )


def test_a_bare_number_is_refused(tmp_path: Path) -> None:
    text = (PROFILES / "devices" / "l4.yaml").read_text().splitlines(keepends=True)
    lines = ["context_bytes: 1000\n" if line.startswith("context_bytes") else line for line in text]
    path = tmp_path / "bare.yaml"
    path.write_text("".join(lines))
    with pytest.raises(PlatformError) as refusal:
        load_device(str(path))
    assert str(refusal.value) == (
        f"{path} has 1 fault:\n"
        "  context_bytes: 1000 is not a mapping (a number is {value, source, kind})"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "is not a mapping of keys to values."), ("a: [", "is not YAML: ")],
)
def test_a_file_that_is_no_profile(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    with pytest.raises(PlatformError) as refusal:
        load_device(str(path))
    assert str(refusal.value).startswith(f"{path} {message}")


def test_the_users_profile_hides_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "mist" / "profiles" / "devices"
    folder.mkdir(parents=True)
    mine = edited(tmp_path, "devices/l4.yaml", "value: 3.0e+11", "value: 2.5e+11")
    mine.rename(folder / "l4.yaml")
    assert load_device("l4").profile.hbm_bytes_per_s.value == 2.5e11
    assert list_profiles(Family.DEVICE)["l4"] == folder / "l4.yaml"
    assert set(list_profiles(Family.DEVICE)) == set(DEVICES)


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("hbm_bytes_per_s", "B/s"),
        ("memory_bytes", "B"),
        ("peak_flop_per_s", "FLOP/s"),
        ("bytes_per_param", "B/param"),
        ("half_rate_tokens", "tokens"),
        ("hop_s", "s"),
        ("margin_ratio", ""),
        ("gpus_per_node", ""),
    ],
)
def test_units_are_in_the_keys(key: str, unit: str) -> None:
    assert unit_of_key(key) == unit


def test_a_quantity_must_be_finite() -> None:
    with pytest.raises(ValueError, match="value inf is not a finite number from 0 up"):
        Quantity(value=float("inf"), source="nowhere", kind=Kind.GUESS)


def test_the_listing_shows_every_profile_with_its_kinds() -> None:
    rows = {row.name: row for row in profile_rows()}
    folders = {family.folder for family in Family}
    assert set(rows) == {path.stem for path in FILES if path.parent.name in folders}
    # One figure of the shipped CPU profile is no guess: it has no CUDA context.
    assert rows["cpu"].num_by_kind == {Kind.SPEC: 1, Kind.GUESS: len(figure_rows("cpu")) - 1}


def test_the_listing_of_a_profile() -> None:
    rows = {row.path: row for row in figure_rows("dgx-h100")}
    assert rows["network.nic_bytes_per_s"].value == 50e9
    assert rows["network.nic_bytes_per_s"].unit == "B/s"
    assert rows["tables.all_reduce"].unit == "21 x 3 times"
    runtime = {row.path: row for row in figure_rows("torch")}
    assert runtime["states.moments[0].bytes_per_param"].value == 8.0
    assert runtime["transients.reduce_bytes_per_param.bf16"].unit == "B/param"
    calibration = {row.path: row for row in figure_rows("megatron-h100-sxm")}
    assert calibration["high_deviations"].kind is Kind.CALIBRATED
    assert calibration["values.device.tensor_time_scale"].source.startswith("fitted to ")


def test_the_listing_of_an_unknown_profile() -> None:
    with pytest.raises(PlatformError) as refusal:
        figure_rows("dgx-h10")
    assert str(refusal.value) == (
        "dgx-h10: no profile of that name. Did you mean dgx-h100 or dgx-h200 or dgx-a100?"
    )
