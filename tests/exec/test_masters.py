"""Weights in 16 bits train as fp32 masters: an update of 1e-5 would be lost in them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mist.exec.build.empty_weights import load
from mist.exec.dryrun.dry_run import load_shapes
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from tests.exec.forking import RunRanks
from tests.exec.layouts import S, Variant, write_models
from tests.exec.test_apply import plan_file
from tests.fast_cases import first_fast

BUILT = """
import torch
from plain import build_model as full


def build_model():
    model = full().to(torch.{dtype})
    model.register_buffer("table", torch.ones(3, dtype=torch.{dtype}), persistent=False)
    return model
"""

BUFFERED = """
import torch
from plain import build_model as full


def build_model():
    model = full()
    model.register_buffer("mean", torch.tensor([3.0, 4.0]))
    return model
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path)
    for dtype in ("bfloat16", "float16"):
        (tmp_path / f"{dtype}.py").write_text(BUILT.format(dtype=dtype))
    (tmp_path / "buffered.py").write_text(BUFFERED)
    return tmp_path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_file_that_builds_16_bits_gets_fp32_parameters(folder: Path, dtype: str) -> None:
    source = str(folder / f"{dtype}.py")
    for found in (load(source, Attention.FLASH), load_shapes(source, Attention.FLASH)):
        assert {p.dtype for p in found.module.parameters()} == {torch.float32}
        assert {p.device.type for p in found.module.parameters()} == {"meta"}
        assert found.module.get_buffer("table").dtype is getattr(torch, dtype)


def test_tied_parameters_stay_tied_in_fp32() -> None:
    from mist.exec.build.empty_weights import to_masters

    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    to_masters(model)
    assert model[1].weight is model[0].weight
    assert model[0].weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("precision", "built"),
    first_fast([(Precision.FP32, "bfloat16"), (Precision.BF16, "float16")], width=2),
)
def test_the_trace_sees_what_runs_whatever_was_built(
    folder: Path, precision: Precision, built: str
) -> None:
    setting = TraceSetting(precision=precision, attention=Attention.FLASH)
    plain, half = (
        load_graph(str(folder / f"{name}.py"), setting, progress=lambda _: None)
        for name in ("plain", built)
    )
    assert plain.blocks == half.blocks


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP32])
def test_parallelize_trains_every_element_of_a_bf16_checkpoint(
    folder: Path, precision: Precision, forked: RunRanks
) -> None:
    variant = Variant(
        name="own", model="buffered.py", stages=(S(zero=2),), micro=8, precision=precision
    )
    plan = plan_file(variant, folder)
    forked("tests.exec.half_loop", plan, folder / "buffered.py", num_ranks=1)
