"""Published models: parameters to the unit, and the costs of a layer on a GPU as known formulas."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
from sympy import Expr
from torch import nn

from mist.model.graph import B, Block, ModelGraph, OpKind, S, T, TensorLayout
from mist.model.summary import LayerRun, TpLimit
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph, trace_model
from mist.trace.models.loader import LoadedModel, load_model
from mist.trace.models.presets import PRESETS
from mist.trace.models.source import resolve
from tests.trace.test_exact import family_graph, gpt2

ROOT = Path(__file__).parents[2]
BF16 = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
SILENT = lambda message: None  # noqa: E731


def graph_of(source: str) -> ModelGraph:
    return load_graph(source, BF16, progress=SILENT)


def saved(block: Block) -> Expr:
    return sympy.expand(sum(tensor.bytes for tensor in block.saved))


# Sums over the published shapes; GPT-3 is the paper's 174,600 M with 2048 positions.
NUM_PARAMS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,
    "gemma2-9b": 9_241_705_984,
    "gpt-neox-20b": 20_554_567_680,
    "opt-6.7b": 6_658_473_984,
    "phi3-mini": 3_821_079_552,
    "falcon-7b": 6_921_720_704,
    "bert-large": 335_174_458,
    "t5-large": 737_668_096,
    "vit-large": 304_326_632,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    model = load_model(resolve(name), attention=Attention.FLASH)
    assert sum(p.numel() for p in model.module.parameters()) == NUM_PARAMS[name]


@pytest.fixture(scope="module")
def llama() -> ModelGraph:
    return graph_of("llama3-70b")


def test_llama_layers_are_one_block_80_times(llama: ModelGraph) -> None:
    assert llama.layers == (LayerRun(block=0, count=80),)
    assert llama.num_params == NUM_PARAMS["llama3-70b"]
    (block,) = llama.blocks
    parts = llama.embed.num_params + 80 * block.num_params + llama.head.num_params
    assert parts == llama.num_params
    assert llama.max_seq_len == 8192
    assert not llama.tied
    assert llama.notes == ()


def test_llama_block_costs(llama: ModelGraph) -> None:
    """hidden h = 8192, MLP f = 28672, 64 heads of 128 of which 8 for keys and values.

    Forward: 2 FLOPs a weight and token, 2 * (2 h^2 + 2 h h/8 + 3 h f) = 1711276032, and attention
    4 s^2 h. Backward: twice the matrices, 5/2 of attention. Saved per token, bf16: two norms with
    fp32 copies (4 h each) and their bf16 results twice (2 h each, before and after the weight),
    all replicated, 16 h + 2 fp32 rsqrt = 131080; sharded: q, k, v, attention's result 2 (2 h + 2
    h/8), its fp32 log-sum-exp 4 * 64, SwiGLU 4 * 2 f = 266496; 24 bytes of random state.
    """
    (block,) = llama.blocks
    assert saved(block) == 131080 * B * S + 266496 * B * S / T + 24
    assert block.flop("forward").equals((32768 * B * S**2 + 1711276032 * B * S) / T)
    assert block.flop("backward").equals((81920 * B * S**2 + 3422552064 * B * S) / T)
    assert block.boundary_bytes == 2 * 8192 * B * S
    assert (block.num_entries, block.num_exits, block.num_whole) == (2, 2, 0)
    assert block.domain == ()


def test_llama_tensor_parallel_limits(llama: ModelGraph) -> None:
    assert llama.tp_limits == (
        TpLimit(label="attention heads", size=64),
        TpLimit(label="key/value heads", size=8),
        TpLimit(label="MLP width", size=28672),
    )
    sharded = {param.name for param in llama.blocks[0].params if param.sharded}
    assert len(sharded) == 7
    assert not any("norm" in name for name in sharded)
    assert (llama.embed.num_entries, llama.embed.num_exits) == (0, 1)
    assert (llama.head.num_entries, llama.head.num_exits) == (1, 0)


def test_llama_layouts(llama: ModelGraph) -> None:
    """The inputs of q, k, v and of gate, up are gathered: 2 bytes a token and hidden size each.

    The seed and offset of flash attention are whole on every rank, too.
    """
    (block,) = llama.blocks
    gathered = [(t.module, t.bytes) for t in block.saved if t.layout is TensorLayout.GATHERED]
    inputs = [(module, size) for module, size in gathered if size.free_symbols]
    assert inputs == [("self_attn.q_proj", 2 * 8192 * B * S), ("mlp.gate_proj", 2 * 8192 * B * S)]
    assert sorted(size for _, size in gathered if not size.free_symbols) == [8, 16]
    sharded = [tensor.bytes for tensor in block.saved if tensor.layout is TensorLayout.SHARDED]
    assert sympy.expand(sum(sharded)) == 266496 * B * S / T


def test_llama_attention_op(llama: ModelGraph) -> None:
    (op,) = (
        op for op in llama.blocks[0].ops if op.kind is OpKind.ATTENTION and op.phase == "forward"
    )
    assert op.dims == (B, 64 / T, S, S, 128)
    assert op.causal
    assert op.module == "self_attn"


def test_llama_head_has_the_real_loss(llama: ModelGraph) -> None:
    """Saved per token: norm 4 h + 2 h + 2 h + rsqrt, fp32 log-softmax 4 V / t, shifted label 8."""
    assert saved(llama.head) == (8 * 8192 + 4 + 8) * B * S + 4 * 128256 * B * S / T + 4
    assert llama.head.flop("forward").equals(2 * 8192 * 128256 * B * S / T)


@pytest.mark.slow
def test_experts_divide_by_their_width() -> None:
    """Attention and experts: two regions a layer; routing is on all tokens, and whole."""
    graph = graph_of("mixtral-8x7b")
    assert graph.notes == (
        "mixture of experts: even routing is assumed, and every rank holds all experts (ep = 1)",
    )
    assert graph.tp_limits == (
        TpLimit(label="attention heads", size=32),
        TpLimit(label="key/value heads", size=8),
        TpLimit(label="expert width", size=14336),
    )
    (block,) = graph.blocks
    assert (block.num_entries, block.num_exits, block.num_whole) == (2, 2, 0)
    # 2 of 8 experts a token, each 3 h f; q and o h^2 each, k and v h^2 / 4 each; the router 8 h.
    h, f = 4096, 14336
    divided = 2 * (2 * 3 * h * f + 2 * h**2 + 2 * h**2 // 4) + 4 * h * S
    assert block.flop("forward").equals(B * S * (divided / T + 2 * 8 * h))
    gathered = {t.module for t in block.saved if t.layout is TensorLayout.GATHERED}
    assert {"mlp.gate", "mlp.experts"} <= gathered


@pytest.mark.slow
def test_latent_attention_divides_by_heads() -> None:
    """The plan does not name it; 128 heads of 128 + 64 numbers for scores and 128 for values."""
    graph = graph_of("deepseek-v3")
    assert [run.count for run in graph.layers] == [3, 58]
    assert [block.num_whole for block in graph.blocks] == [0, 0]
    h, heads, q_latent, latent = 7168, 128, 1536, 512
    whole = h * (q_latent + latent + 64)
    divided = heads * (192 * q_latent + 256 * latent + 128 * h) + 3 * h * 18432
    attention = heads * (192 + 128) * S
    dense = graph.blocks[0].flop("forward")
    assert dense.equals(2 * B * S * (whole + (divided + attention) / T))


@pytest.mark.slow
def test_gpt2_ties_its_embedding() -> None:
    graph = family_graph(gpt2, torch.float32, BF16)
    assert graph.tied
    (head,) = (param for param in graph.head.params if param.tied)
    assert head.numel == 512 * 128
    assert graph.num_params == graph.embed.num_params + 2 * graph.blocks[0].num_params + 256
    assert graph.tp_limits == (
        TpLimit(label="attention heads", size=4),
        TpLimit(label="MLP width", size=512),
    )


@pytest.mark.slow
def test_gpt2_dropout_masks_are_one_byte_on_a_gpu() -> None:
    (block,) = family_graph(gpt2, torch.float32, BF16).blocks
    masks = [tensor for tensor in block.saved if tensor.op == "aten.native_dropout"]
    assert [(mask.dtype, mask.bytes) for mask in masks] == [("bool", 128 * B * S)] * 2


@pytest.mark.slow
def test_norm_statistics_are_fp32_on_a_gpu() -> None:
    (block,) = family_graph(gpt2, torch.float32, BF16).blocks
    norms = [tensor for tensor in block.saved if tensor.op == "aten.native_layer_norm"]
    assert [tensor.bytes for tensor in norms if tensor.dtype == "float32"] == [4 * B * S] * 4


def test_examples_are_traced() -> None:
    graph = graph_of(str(ROOT / "examples/my_transformer.py"))
    assert graph.name == "my-transformer"
    assert graph.max_seq_len == 4096
    assert graph.tp_limits is not None
    assert graph.blocks[0].num_exits == 2
    assert graph.layers == (LayerRun(block=0, count=24),)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["llama3_8b", "gpt2_xl"])
def test_example_is_its_preset(stem: str) -> None:
    name = stem.replace("_", "-")
    example = graph_of(str(ROOT / f"examples/{stem}.py"))
    preset = graph_of(name)
    assert example.name == name
    assert example.fingerprint == preset.fingerprint
    assert example == preset


@pytest.mark.slow
def test_fingerprint_is_the_model_not_the_trace(llama: ModelGraph) -> None:
    fp32 = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")
    graphs = [family_graph(gpt2, torch.float32, setting) for setting in (fp32, BF16)]
    assert graphs[0].fingerprint == graphs[1].fingerprint
    assert llama.fingerprint.startswith("sha256:")


@pytest.mark.slow
def test_tracing_leaves_the_model_as_it_was() -> None:
    model = gpt2(torch.float32, "cpu")
    before = {name: (id(p), p.device, p.dtype) for name, p in model.named_parameters()}
    trace_model(model, BF16)
    assert {name: (id(p), p.device, p.dtype) for name, p in model.named_parameters()} == before
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert model(input_ids=ids).logits.shape == (1, 4, 512)
    assert all("forward" not in vars(layer) for layer in model.transformer.h)
    assert model.config.vocab_size == 512


MEASURE = """
import re, sys, time
from pathlib import Path
start = time.process_time()
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
load_graph(sys.argv[1], setting, progress=lambda message: None)
seconds = time.process_time() - start
heavy = "torch" in sys.modules
# Of this program: getrusage's peak counts that of the process that started it.
peak = re.search("VmHWM: *([0-9]+)", Path("/proc/self/status").read_text().expandtabs(1))
print(seconds, 1024 * int(peak[1]), heavy)
"""


def measured(name: str, cache: Path) -> tuple[float, float, bool]:
    """CPU seconds, peak bytes and whether torch was imported, of a load in a new process."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, name],
        capture_output=True, text=True, check=True, env=env, cwd=ROOT,
    )  # fmt: skip
    seconds, peak, heavy = run.stdout.split()
    return float(seconds), float(peak), heavy == "True"


# CPU seconds with the imports of torch and transformers; bars of the project on two shared cores.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "bar_s"), [("llama3-8b", 12.0), ("llama3-405b", 15.0)])
def test_cold_trace_is_quick_and_small(name: str, bar_s: float, tmp_path: Path) -> None:
    seconds, peak_bytes, heavy = measured(name, tmp_path)
    assert heavy
    assert seconds <= bar_s
    assert peak_bytes < 1024**3
    seconds, _, heavy = measured(name, tmp_path)
    assert not heavy
    assert seconds < 2.0  # sympy's import is most of it; test_cache times the load alone


class Generator(nn.Module):
    """A model that takes its wish for a cache from its configuration, as Granite 4 does."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.seen: list[bool] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.config.use_cache)
        return ids


def test_no_cache_is_kept_for_generation() -> None:
    model = Generator()
    loaded = LoadedModel(module=model, name="generator", make_batch=None, loss=None)
    loaded.forward({"ids": torch.zeros(1)})
    loaded.forward(torch.zeros(1))
    assert model.seen == [False, False]
    assert model.config.use_cache
