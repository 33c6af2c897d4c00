"""Profiles that say how they differ from another one: what they keep of it."""

from pathlib import Path

import pytest

from mist.errors import PlatformError
from mist.plans.provenance import Kind
from mist.platform.base_profile import base_of, over_base
from mist.platform.profiles import find_calibration, load_cluster, load_device
from tests.platform.samples import PROFILES

BASE = {
    "name": "base",
    "memory_bytes": {"value": 1.0, "source": "sheet", "kind": "spec"},
    "gemm": {
        "bf16": {
            "peak": {"value": 2.0, "source": "sheet", "kind": "spec"},
            "launch": {"value": 3.0, "source": "table", "kind": "fit"},
        }
    },
    "tables": {"all_gather": {"rows": [[1, 2]], "source": "nccl", "kind": "measured"}},
    "links": [{"group": 2, "latency": {"value": 4.0, "source": "nccl", "kind": "fit"}}],
}


def test_own_figures_over_guesses() -> None:
    peak = {"value": 5.0, "source": "own sheet", "kind": "spec"}
    own = {"name": "own", "like": "base", "gemm": {"bf16": {"peak": peak}}, "tables": {}}
    assert over_base(own, BASE) == {
        "name": "own",
        "memory_bytes": {"value": 1.0, "source": "as base: sheet", "kind": "guess"},
        "gemm": {
            "bf16": {
                "peak": peak,
                "launch": {"value": 3.0, "source": "as base: table", "kind": "guess"},
            }
        },
        "tables": {},
        "links": [
            {"group": 2, "latency": {"value": 4.0, "source": "as base: nccl", "kind": "guess"}}
        ],
    }  # fmt: skip


def test_a_name_is_never_that_of_the_base() -> None:
    assert "name" not in over_base({"like": "base"}, BASE)


def test_the_base_of_a_file() -> None:
    assert base_of(b"schema: x\nlike: l40s\nname: y\n") == "l40s"
    assert base_of(b"what: it is\n# like: l40s\n") is None


def test_a_shipped_device_and_a_shipped_cluster() -> None:
    a40, l40s = load_device("a40").profile, load_device("l40s").profile
    assert a40.flash_attention.laws[0].efficiency_ratio.value == (
        l40s.flash_attention.laws[0].efficiency_ratio.value
    )
    assert a40.flash_attention.laws[0].efficiency_ratio.kind is Kind.GUESS
    assert (a40.hbm_bytes_per_s.value, a40.hbm_bytes_per_s.kind) == (6.96e11, Kind.SPEC)
    assert not a40.is_measured
    h20 = load_cluster("hgx-h20").profile
    assert (
        h20.tables["all_gather"].rows == load_cluster("dgx-h100").profile.tables["all_gather"].rows
    )
    assert h20.tables["all_gather"].kind is Kind.GUESS


def test_calibrations_are_of_a_chip() -> None:
    found = find_calibration("megatron", load_device("a800-sxm-80").profile)
    assert found is not None
    assert found == find_calibration("megatron", load_device("a100-sxm-80").profile)
    assert find_calibration("megatron", load_device("a40").profile) is None


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        ("l40x", "l40x: Did you mean l40s or l4 or a40?"),
        ("a40", "a40, which is like another one. Name that."),
    ],
)
def test_a_base_that_is_none(base: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        (PROFILES / "devices/a40.yaml").read_text().replace("like: l40s", f"like: {base}")
    )
    with pytest.raises(PlatformError) as refused:
        load_device(str(path))
    assert str(refused.value).startswith(f"{path} is like {fault}")


def test_the_hash_is_of_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "mist/profiles/devices"
    own.mkdir(parents=True)
    shipped = load_device("a40").sha256
    (own / "l40s.yaml").write_text((PROFILES / "devices/l40s.yaml").read_text() + "# mine\n")
    assert load_device("a40").sha256 != shipped
