"""What stands for a source: by the shipped table, by the user's, and by what its rows say."""

from pathlib import Path

import pytest

from mist.errors import PlatformError
from mist.plans.numerics import NUMERICS
from mist.validate.cases import grouped
from mist.validate.sources import load_source_ratios, load_sources, unlisted
from tests.validate.rows import run


@pytest.mark.parametrize(
    ("columns", "runtime"),
    [
        ({"zero_or_fsdp": "fsdp1-full", "tp": 2}, "fsdp1"),
        ({"zero_or_fsdp": "fsdp2-full"}, "torch"),
        ({"zero_or_fsdp": "hsdp"}, "torch"),
        ({"zero_or_fsdp": "zero2"}, "deepspeed-zero3"),
        ({"zero_or_fsdp": "zero3"}, "deepspeed-zero3"),
        ({"zero_or_fsdp": "ddp+dist-optimizer(zero1)", "tp": 2}, "megatron"),
        ({"zero_or_fsdp": "none", "pp": 2}, "megatron"),
        ({"zero_or_fsdp": "none", "precision": "fp16"}, "megatron"),
        ({"zero_or_fsdp": "none"}, "torch"),
    ],
)
def test_the_runtime_of_a_source_that_no_table_has(
    columns: dict[str, object], runtime: str
) -> None:
    one = run(**{"tp": 1, "pp": 1, "precision": "bf16", **columns})
    assert unlisted(one).runtime == runtime
    assert load_sources().of(one).runtime == runtime


def test_a_table_of_ones_own_goes_before_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: mist.sources/1\n"
        "sources:\n  hand: {runtime: megatron, memory: allocated, cluster: hgx-h100-ib}\n"
    )
    table = load_sources(path)
    one = run(gpu="H100-80GB-SXM", zero_or_fsdp="none")
    (group,), _ = grouped([one], table, calibrated=False)
    assert (group.machine.runtime.name, group.machine.cluster.name) == ("megatron", "hgx-h100-ib")
    assert group.key.origin.memory == "allocated"
    assert table.of(run(source="torchtitan")) == load_sources().of(run(source="torchtitan"))


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schema: mist.sources/1\nsources: {hand: {memory: allocated}}\n")
    with pytest.raises(PlatformError, match=r"sources\.hand"):
        load_sources(path)


def test_ratios_are_of_sources_of_the_table() -> None:
    table, ratios = load_sources(), load_source_ratios()
    assert {*ratios.ratios, *ratios.fp8} <= {*table.sources}
    assert ratios.of("no source", "h100-sxm", NUMERICS["bf16"]) == {}
