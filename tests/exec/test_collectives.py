"""What a rank issues in a step is what the cost model charges for: kind, count and bytes.

Expected, with L layers, G micro-batches, P parameters in bytes. Data parallel: FSDP2 has a group
for each layer and one for the rest (L + 1). ZeRO-3 gathers layers before forward and backward and
the rest once, in every micro-batch: G (2L + 1); ZeRO-1 and 2 once per step: L + 1. ZeRO-2 and 3
scatter G (L + 1) times, ZeRO-1 L + 1 times; ZeRO-0 reduces L + 1 times. Tensor parallel: the
collectives of the traced blocks, embedding and head once, layers L times, all G times. Sums of a
few numbers (loss, norm, gradients of norms) are left out: nothing charges for them. With copies of
the states (HSDP) gathers and scatters are the same, and each of m ranks of a copy sums its part of
every group, P / m bytes in all, once per step.
"""

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mist.model.graph import B, ModelGraph, S, T
from mist.plans.workload import Attention, Precision
from mist.platform.profiles import load_runtime
from mist.symbolic.collective_counts import charged
from mist.trace import TraceSetting, load_graph
from tests.exec.forking import RunRanks, interpreters
from tests.exec.layouts import BATCH, NUM_LAYERS, SEQ_LEN, Variant, plan_of, write_models
from tests.exec.running import variant_of

DATA = [f"zero{z}{more}" for z in range(4) for more in ("", " accumulated")]
TENSOR = ["tp2", "tp2 sp", "plain tp2"]
PIPELINE = ["pp2 1+3", "pp2 gpipe"]
FAST = ["zero3 accumulated", "tp2 sp", "pp2 gpipe"]
HYBRID = [f"hsdp zero{z}{more}" for z in (1, 2, 3) for more in ("", " accumulated")]
SMALL_BYTES = 4 * BATCH * SEQ_LEN * 4 + 1  # of a sum over tokens, or of a few norms
FP32_BYTES = 4
NUMBERS_BYTES = 2 * 8 + 4  # loss and number of tokens in float64, norm in fp32: two sums

Rows = dict[tuple[str, str], tuple[int, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("collectives")
    write_models(path)
    return path


@pytest.fixture(scope="module")
def issued(folder: Path, forked: RunRanks) -> Callable[[str], Rows]:
    """Large collectives of a variant, (axis, kind) to (count, bytes): fast ones in one launch."""

    @cache
    def launched(*, is_fast: bool) -> dict[str, Rows]:
        names = [n for n in (*DATA, *TENSOR, *PIPELINE) if (n in FAST) is is_fast]
        return counted(names, folder, forked if is_fast else interpreters, num_ranks=2)

    return lambda name: launched(is_fast=name in FAST)[name]


def cases(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in names]


def counted(names: list[str], folder: Path, run: RunRanks, *, num_ranks: int) -> dict[str, Rows]:
    out = folder / "counted.json"
    run("tests.exec.counting", folder, out, *names, num_ranks=num_ranks)
    found: dict[str, Rows] = {}
    for name, counted in json.loads(out.read_text()).items():
        rows = counted["collectives"]
        found[name] = {(r["axis"], r["kind"]): (r["count"], r["bytes"]) for r in rows}
    return found


def graph_of(variant: Variant, folder: Path) -> ModelGraph:
    setting = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH)
    return load_graph(str(folder / variant.model), setting, progress=lambda message: None)


@pytest.mark.parametrize("name", cases(DATA))
def test_data_parallel_collectives(name: str, issued: Callable[[str], Rows], folder: Path) -> None:
    variant = variant_of(name)
    zero, steps = variant.stages[0].zero, BATCH // variant.micro
    graph = graph_of(variant, folder)
    ends = (graph.embed.num_params + graph.head.num_params) * FP32_BYTES
    layers = graph.num_params * FP32_BYTES - ends
    rows = {key: row for key, row in issued(name).items() if key[1] != "all_reduce"}
    times = steps if zero >= 2 else 1
    if zero == 0:
        count, size = issued(name)["dp", "all_reduce"]
        assert rows == {}
        assert (count - 2, size - NUMBERS_BYTES) == (NUM_LAYERS + 1, layers + ends)
        return
    gathers = (1, 1) if zero < 3 else (2 * steps, steps)
    assert rows == {
        ("dp", "all_gather"): (
            gathers[0] * NUM_LAYERS + gathers[1],
            gathers[0] * layers + gathers[1] * ends,
        ),
        ("dp", "reduce_scatter"): (times * (NUM_LAYERS + 1), times * (layers + ends)),
    }


@pytest.mark.parametrize("name", cases(TENSOR))
def test_tensor_parallel_collectives(
    name: str, issued: Callable[[str], Rows], folder: Path
) -> None:
    variant = variant_of(name)
    stage, steps = variant.stages[0], BATCH // variant.micro
    graph = graph_of(variant, folder)
    blocks = [graph.embed, *[graph.blocks[0]] * NUM_LAYERS, graph.head]
    at = {B: variant.micro, S: SEQ_LEN, T: 2}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for block in blocks:
        for each in block.collectives(sequence_parallel=stage.sp):
            counts[each.kind] += steps * each.count
            sizes[each.kind] += steps * each.count * int(each.bytes.subs(at))
    for kind, count in counts.items():
        found, size = issued(name)["tp", kind]
        if kind == "all_reduce":  # beside 3 of the divided loss each time
            found, size = found - 3 * steps - 2, size - _of_loss(variant.micro) * steps
            size -= NUMBERS_BYTES
        assert (kind, found, size) == (kind, count, sizes[kind])


def _of_loss(micro: int) -> int:
    """Bytes of the sums of a divided cross-entropy: maximum, sum and target, each [b, s]."""
    return 3 * micro * SEQ_LEN * FP32_BYTES


@pytest.mark.parametrize("name", cases(PIPELINE))
def test_pipeline_transfers(name: str, issued: Callable[[str], Rows], folder: Path) -> None:
    variant = variant_of(name)
    steps = BATCH // variant.micro
    at = {B: variant.micro, S: SEQ_LEN, T: 1}
    size = int(graph_of(variant, folder).blocks[0].boundary_bytes.subs(at))
    assert issued(name)["pp", "send"] == (steps, steps * size)
    assert issued(name)["pp", "receive"] == (steps, steps * size)


@pytest.mark.slow
def test_collectives_of_copies_of_the_states(folder: Path) -> None:
    issued = counted(HYBRID, folder, interpreters, num_ranks=4)
    runtime = load_runtime("torch").profile
    for name in HYBRID:
        variant = variant_of(name)
        graph, plan = graph_of(variant, folder), plan_of(variant, folder)
        found = {key: row for key, row in issued[name].items() if key[0] == "dp"}
        assert found == charged(graph, runtime, plan, 0)
        times = BATCH // variant.micro if variant.stages[0].zero >= 2 else 1
        total = graph.num_params * FP32_BYTES
        assert found["dp", "reduce_scatter"] == (times * (NUM_LAYERS + 1), times * total)
        assert found["dp", "all_reduce"] == (NUM_LAYERS + 1, total // 2)
