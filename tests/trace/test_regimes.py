"""Models that run otherwise at other lengths: each regime against real CPU tensors, on both sides.

A window, a registered mask or a chunk decides how a layer runs; a trace holds for the lengths that
decide alike, and another length has a trace of its own.
"""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import create_sliding_window_causal_mask

from mist.model.graph import ModelGraph, OpKind, S
from mist.model.summary import Lengths
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, model_trace, trace_model
from mist.trace.models.loader import LoadedModel
from mist.trace.runs import Progress, Recorded
from tests.trace.real import measure
from tests.trace.test_exact import flop, saved_bytes, token_ids

WINDOW = 64
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW}
KINDS = ["sliding_attention", "full_attention"]


class MaskedAttention(nn.Module):
    """minGPT's: a mask for the longest sequence is a buffer, of which a part is read."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("mask", torch.tril(torch.ones(128, 128)).view(1, 1, 128, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = (part.view(b, s, 4, 16).transpose(1, 2) for part in self.qkv(x).split(64, 2))
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.mask[:, :, :s, :s] == 0, -1e4)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, h))


class Masked(nn.Module):
    block_size = 128

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(512, 64), nn.Linear(64, 512)
        self.positions = nn.Embedding(128, 64)
        self.layers = nn.ModuleList(MaskedAttention() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def of_config(config: object, kind: str, device: str) -> nn.Module:
    with torch.device(device):
        build = getattr(transformers, kind)._from_config
        model: nn.Module = build(config, dtype=torch.float32)
    return model.train()


def gemma3(device: str) -> nn.Module:
    config = transformers.Gemma3TextConfig(**DECODER, layer_types=KINDS)
    return of_config(config, "Gemma3ForCausalLM", device)


def mistral(device: str) -> nn.Module:
    return of_config(transformers.MistralConfig(**DECODER), "MistralForCausalLM", device)


def modernbert(device: str) -> nn.Module:
    config = transformers.ModernBertConfig(
        **SIZES, layer_types=KINDS, local_attention=WINDOW, pad_token_id=0, cls_token_id=1
    )
    return of_config(config, "ModernBertForMaskedLM", device)


def mamba2(device: str) -> nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        chunk_size=32,
    )
    return of_config(config, "Mamba2ForCausalLM", device)


def masked(device: str) -> nn.Module:
    with torch.device(device):
        return Masked().train()


Family = Callable[[str], nn.Module]
KNOWN: dict[tuple[Family, str], list[ModelGraph]] = {}
SLOW = pytest.mark.slow
CASES = [
    pytest.param(
        gemma3, "model.layers.0", [(1, 40), (2, 64), (3, 65), (2, 200)], id="gemma3", marks=SLOW
    ),
    pytest.param(
        mistral, "model.layers.0", [(1, 40), (2, 64), (3, 65), (2, 200)], id="mistral", marks=SLOW
    ),
    pytest.param(modernbert, "model.layers.0", [(2, 20), (3, 100)], id="modernbert", marks=SLOW),
    pytest.param(mamba2, "backbone.layers.1", [(2, 96), (3, 70)], id="mamba2", marks=SLOW),
    pytest.param(masked, "layers.1", [(1, 20), (2, 127), (3, 128)], id="registered-mask"),
]


@pytest.mark.parametrize(("family", "path", "points"), CASES)
def test_each_regime_equals_real_tensors(
    family: Family, path: str, points: list[tuple[int, int]]
) -> None:
    model = family("cpu")
    number = int(path[-1])
    for b, s in points:
        graph = regime(family, s)
        block = graph.blocks[graph.layer_kinds()[number]]
        inputs = {"ids": token_ids(b, s)["input_ids"]} if family is masked else token_ids(b, s)
        real = measure(model, path, inputs)
        assert saved_bytes(block.saved_single if b == 1 else block.saved, b, s) == real.saved_bytes
        assert flop(block, "forward", OpKind.GEMM, b, s) == real.forward_flop
        # Torch counts the gradient of a grouped convolution's input as if it had one group.
        excess = 2 * b * (s + 3) * 80 * 4 * (80 - 1) if family is mamba2 else 0
        assert flop(block, "backward", OpKind.GEMM, b, s) == real.backward_flop - excess


def traced(family: Family, seq_len: int | None, policy: str = "cpu") -> ModelGraph:
    setting = TraceSetting(
        precision=Precision.FP32 if policy == "cpu" else Precision.BF16,
        attention=Attention.FLASH,
        policy="cpu" if policy == "cpu" else "cuda",
        seq_len=seq_len,
    )
    return trace_model(family("meta"), setting)


def regime(family: Family, seq_len: int, policy: str = "cpu") -> ModelGraph:
    """The trace that holds for a length, made at the first length of its regime that is asked for.

    So what was traced at one length is compared with real tensors at others, up to its ends.
    """
    known = KNOWN.setdefault((family, policy), [])
    graph = next((each for each in known if seq_len in each.lengths), None)
    if graph is None:
        graph = traced(family, seq_len, policy)
        assert seq_len in graph.lengths
        known.append(graph)
    return graph


@pytest.mark.slow
def test_a_regime_is_an_interval_that_ends_where_the_model_runs_otherwise() -> None:
    assert regime(mistral, 40).lengths == Lengths(last=WINDOW - 1)
    assert regime(mistral, 384).lengths == Lengths(first=WINDOW)


def test_the_longest_length_of_a_registered_mask_is_traced() -> None:
    assert 128 in regime(masked, 128).lengths
    assert 20 in regime(masked, 20).lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "s", "num_runs"),
    [
        (masked, 100, 1),  # holds at the usual length, too
        (masked, 128, 2),  # the limit: its mask is read whole, as at no other length
        (mistral, 200, 1),  # as at the usual length, beyond the window
        (mistral, 40, 1),  # within it, where the usual does not hold
        (mamba2, 100, 1),
    ],
)
def test_the_length_that_is_asked_for_is_traced_once(
    monkeypatch: pytest.MonkeyPatch, family: Family, s: int, num_runs: int
) -> None:
    lengths, record = list[int | None](), model_trace.record_model

    def counted(model: LoadedModel, setting: TraceSetting, progress: Progress) -> Recorded:
        lengths.append(setting.seq_len)
        return record(model, setting, progress)

    monkeypatch.setattr(model_trace, "record_model", counted)
    assert s in traced(family, s).lengths
    assert len(lengths) == num_runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "s"),
    [(masked, 100), (mistral, 200), (mamba2, 512)],
)
def test_a_trace_that_holds_at_both_lengths_is_the_usual_one(family: Family, s: int) -> None:
    """So what is cached does not depend on the length that was asked for first."""
    usual = traced(family, None)
    assert s in usual.lengths
    assert traced(family, s) == usual


@pytest.mark.slow
@pytest.mark.parametrize("s", [65, 200, 1000])
def test_windowed_layers_attend_to_the_pairs_of_their_mask(s: int) -> None:
    """Counted from the mask that transformers makes for the layer on real tensors."""
    graph = regime(gemma3, s, "cuda")
    sliding, full = (graph.blocks[kind] for kind in graph.layer_kinds())
    model = gemma3("cpu")
    mask = create_sliding_window_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, s, 64),
        attention_mask=None,
        past_key_values=None,
    )
    heads, head_dim, b = 4, 16, 2
    pairs = int(mask.sum())
    forward = 4 * b * heads * head_dim * pairs
    assert flop(sliding, "forward", OpKind.ATTENTION, b, s) == forward
    assert flop(sliding, "backward", OpKind.ATTENTION, b, s) == forward * 5 // 2
    assert flop(full, "forward", OpKind.ATTENTION, b, s) == 4 * b * heads * head_dim * s * s
    # The kernel saves what flash attention saves, and no mask of [s, s].
    assert saved_bytes(sliding.saved, b, s) <= saved_bytes(full.saved, b, s)
    assert not any(each.bytes.has(S**2) for each in graph.shared)
