"""What a model says of itself before its trace, which says the same; refusals come first."""

import json
from functools import partial
from pathlib import Path

import pytest

from mist.errors import InputError, StatesTooLarge
from mist.model.summary import ModelLimits
from mist.plans.search_space import SearchSpace
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.planning import Effort, make_plan
from mist.workflow.request import Question

SETTING = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
ATTENTION, SHARED, KV = "attention heads", "key/value heads", "num_key_value_heads"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}


slow = partial(pytest.param, marks=pytest.mark.slow)  # of a kind that another one shows too


def config(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(SIZES | fields))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({"model_type": "llama", KV: 2}, {ATTENTION: 6, SHARED: 2}),
        ({"model_type": "llama", KV: 6}, {ATTENTION: 6}),
        ({"model_type": "qwen3", KV: 3, "head_dim": 16}, {ATTENTION: 6, SHARED: 3}),
        ({"model_type": "llama", KV: 1}, {}),  # left to the trace
        ({"model_type": "phi3", KV: 2, "pad_token_id": 0}, {}),
        ({"model_type": "opt", "ffn_dim": 192}, {}),
    ],
)  # fmt: skip
def test_heads_before_and_after_the_trace(
    tmp_path: Path, fields: dict[str, object], heads: dict[str, int]
) -> None:
    early: list[ModelLimits] = []
    path = config(tmp_path, **fields)
    graph = load_graph(str(path), SETTING, progress=lambda _: None, refuse=early.append)
    (limits,) = early
    assert {limit.label: limit.size for limit in limits.tp_limits} == heads
    assert set(limits.tp_limits) <= set(graph.tp_limits or ())
    assert limits.max_seq_len == graph.max_seq_len == 256
    assert limits.name == graph.name


@pytest.mark.parametrize(
    ("asked", "layout", "message"),
    [
        (
            {"seq_len": 257},
            HandLayout(),
            "--seq 257: {name} has positions for 256 tokens. Use --seq 256 or less, or a model "
            "with more: max_position_embeddings of a config.json can be raised.",
        ),
        (
            {"seq_len": 64},
            HandLayout(tp=4),
            "tp 4 does not divide the 6 attention heads of {name}.",
        ),
    ],
)
def test_refused_before_the_trace(
    tmp_path: Path, asked: dict[str, int], layout: HandLayout, message: str
) -> None:
    path = config(tmp_path, model_type="llama", **{KV: 6})
    lines: list[str] = []
    question = Question(model=str(path), num_gpus=8, global_batch=8, **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError) as refused:
        check_layout(question, layout, lines.append)
    assert str(refused.value) == message.format(name=tmp_path.name)
    assert not any("tracing" in line for line in lines)


def test_positions_of_a_model_file(tmp_path: Path) -> None:
    path = tmp_path / "short.py"
    path.write_text(
        "from torch import nn\n\n\nclass Short(nn.Module):\n    max_seq_len = 64\n\n"
        "    def forward(self, ids):\n        raise AssertionError('it is traced')\n\n\n"
        "build_model = Short\n"
    )
    with pytest.raises(InputError, match=r"^--seq 65: short has positions for 64 tokens\."):
        check_layout(Question(model=str(path), num_gpus=1, seq_len=65), HandLayout())


def test_states_without_room_are_refused_before_the_trace(tmp_path: Path) -> None:
    """70e9 parameters of 12 bytes, on one L4 with 384 GB of host memory."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    path = config(tmp_path, model_type="llama", **sizes, **{KV: 8, "num_attention_heads": 64})
    lines: list[str] = []
    question = Question(model=str(path), num_gpus=1, gpu="l4", seq_len=256)
    with pytest.raises(StatesTooLarge, match=" At least 16 such GPUs have room for them, "):
        make_plan(question, SearchSpace(), Effort(progress=lines.append))
    assert not any("tracing" in line for line in lines)
