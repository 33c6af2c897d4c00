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


@pytest.mark.parametrize(
    ("notes", "overlaps", "keeps_half"),
    [
        ("FSDP2 4 x TP 2 eager", 1.0, True),
        ("graph trainer, AOT eager backend", 0.0, True),
        ("compiler toolkit, backend not stated", 0.0, True),
        ("graph trainer (one traced graph, regional Inductor)", 1.0, False),
    ],
)
def test_notes_say_what_else_a_run_of_a_source_ran(
    notes: str, overlaps: float, keeps_half: bool
) -> None:
    """Each in a group of its own, and all under the constants of their source."""
    plain = run(source="torchtitan-log", zero_or_fsdp="fsdp2-full")
    noted = run(source="torchtitan-log", zero_or_fsdp="fsdp2-full", run_id="two", notes=notes)
    groups, _ = grouped([plain, noted], load_sources(), calibrated=True)
    assert len(groups) == (1 if "FSDP2" in notes else 2)
    runtime = groups[-1].machine.runtime
    assert runtime.overlap.zero_all_gather_ratio.value == overlaps
    assert runtime.overlap.zero_reduce_scatter_ratio.value == overlaps
    assert runtime.selective is not None
    assert runtime.selective.keeps_half_products is keeps_half
    assert (groups[0].figures, groups[0].key.source) == (groups[-1].figures, groups[-1].key.source)
