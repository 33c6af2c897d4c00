"""What two converted layers in a row keep on this CPU, against the trace of one: not a byte apart.

The expressions in b, s and t come from the trace of the converted model; the bytes from tensors.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from mist.layers import RUNGS, convert
from mist.layers.masks import Masks
from mist.model.graph import B, Block, S, T
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from tests.layers.families import ENDS, causal
from tests.tokens import tokens
from tests.trace.real import Watch, layer_inputs

GROUPED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LARGE = {n: v for n, v in GROUPED.items() if n != "num_key_value_heads"}


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0}
    return causal(hf.GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, **ENDS))


def bert(**more: int) -> nn.Module:
    config = hf.BertConfig(**(LARGE | more))
    return hf.BertForMaskedLM._from_config(config, attn_implementation="eager")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: causal(hf.LlamaConfig(**GROUPED)),
    "gpt2": gpt2,
    "bert": bert,
    "gemma": lambda: causal(hf.Gemma2Config(**GROUPED, head_dim=16)),
    "mixtral": lambda: causal(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
}
LAYERS = {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


def built(family: str, level: str, masks: Masks, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[family]().to(dtype).train()
    if level != "none":
        convert(model, level, masks=masks)
    return model


def block_of(family: str, level: str, masks: Masks, precision: Precision) -> Block:
    """The trace of the first kind of layer of a converted model on the meta device."""
    attention = Attention.MATH if family in {"bert", "gemma"} else Attention.FLASH
    setting = TraceSetting(precision=precision, attention=attention, policy="cpu")
    return trace_model(built(family, level, masks, DTYPES[precision], "meta"), setting).blocks[0]


def expected(block: Block, b: int, s: int) -> int:
    """The expression of one layer at a point without tensor parallelism."""
    values = {B: b, S: s, T: 1} | tokens(1, 1)
    saved = block.saved_single if b == 1 else block.saved
    return sum(int(tensor.bytes.subs(values)) for tensor in saved)


def batch_of(path: str, b: int, s: int) -> dict[str, Any]:
    """Tokens for a model whose layers are at `path`; without a cache, which grows with each run."""
    ids = {"input_ids": torch.zeros(b, s, dtype=torch.int64)}
    return ids | ({} if path == LAYERS["bert"] else {"use_cache": False})


def stacked(model: nn.Module, path: str, b: int, s: int) -> tuple[int, int, int]:
    """Bytes that two layers in a row keep by hooks, and by what is alive; and of one activation.

    Both count the input of the first and the output of the second where they are kept.
    """
    layers = list(model.get_submodule(path).children())
    (x, *args), kwargs = layer_inputs(model, layers[0], batch_of(path, b, s))
    x = x.detach().requires_grad_().view_as(x)
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    given += [t for each in kwargs.values() if isinstance(each, tuple) for t in each]
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *given)}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    made, y = Watch([], known), x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), made:
        for layer in layers[:2]:
            y = layer(y, *args, **kwargs)
            y = y[0] if isinstance(y, tuple) else y
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in found.items()}
    ends = {t.untyped_storage()._cdata for t in (x, y)}
    found.clear()
    alive = made.alive(ends) + sum(sizes.get(key, 0) for key in ends)
    return sum(sizes.values()), alive, x.numel() * x.element_size()


SLOW = pytest.mark.slow
FAST = {("gpt2", "drop-norm", Precision.BF16)}
CASES = [
    pytest.param(family, level, precision, marks=() if each in FAST else SLOW)
    for family in MODELS
    for level in ("none", *RUNGS)
    for precision in (Precision.FP32, Precision.BF16)
    for each in [(family, level, precision)]
]


@pytest.mark.parametrize(("family", "level", "precision"), CASES)
def test_two_layers_keep_what_the_expression_says(
    family: str, level: str, precision: Precision
) -> None:
    block = block_of(family, level, "byte", precision)
    model = built(family, level, "byte", DTYPES[precision], "cpu")
    # A norm that ends a layer and keeps its output keeps the input of the next: one tensor, which
    # the expression has once; of the last of them there is no next.
    last = family == "bert" and level in RUNGS and RUNGS[level].norms == "output"
    for b, s in ((1, 32), (2, 33), (3, 64)):
        hooks, alive, activation = stacked(model, LAYERS.get(family, "model.layers"), b, s)
        assert hooks == alive
        assert alive == 2 * expected(block, b, s) + (activation if last else 0), (b, s)


def published_shapes() -> dict[str, Callable[[], nn.Module]]:
    """Llama with grouped heads and 3.5 h, GPT-2, and BERT-Large with dropout."""
    wide = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    gpt = {"vocab_size": 64, "n_embd": 512, "n_layer": 2, "n_head": 8, "resid_pdrop": 0.0}
    config = hf.GPT2Config(**gpt, attn_pdrop=0.0, embd_pdrop=0.0, **ENDS)
    return {
        "llama": lambda: causal(hf.LlamaConfig(**(GROUPED | wide))),
        "gpt2": lambda: causal(config),
        "bert": lambda: bert(**large),
    }


BARS = [
    # bf16, s = 512, with the input of the layer: bytes per b*s*h.
    pytest.param("llama", "drop-norm", "byte", 24.5, id="llama"),
    pytest.param("gpt2", "drop-norm", "byte", 20.5, id="gpt2"),
    pytest.param("bert", "drop-norm", "byte", 50.0, id="bert"),
    pytest.param("bert", "drop-norm", "bit", 40.0, id="bert-bits"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "level", "masks", "most"), BARS)
def test_layers_of_published_shape_keep_no_more_than(
    family: str, level: str, masks: Masks, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, family, published_shapes()[family])
    model = built(family, level, masks, torch.bfloat16, "cpu")
    _, alive, activation = stacked(model, LAYERS.get(family, "model.layers"), 1, 512)
    # Two layers, and an activation is two bytes per b*s*h.
    assert alive / 2 / (activation / 2) <= most
