"""One small model of every family that the trace lists, without weights of anybody."""

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers as hf
from torch import nn

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: Final[dict[str, Any]] = SIZES | {"num_key_value_heads": 2}
ENDS: Final[dict[str, Any]] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def causal(config: object) -> nn.Module:
    model: nn.Module = hf.AutoModelForCausalLM.from_config(config)
    return model


def vit() -> nn.Module:
    sizes = {n: v for n, v in SIZES.items() if n != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=16, patch_size=4))


FAMILIES: Final[dict[str, Callable[[], nn.Module]]] = {
    "llama": lambda: causal(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: causal(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: causal(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: causal(hf.MistralConfig(**GROUPED)),
    "gemma2": lambda: causal(hf.Gemma2Config(**GROUPED, head_dim=8)),
    "gemma3": lambda: causal(hf.Gemma3TextConfig(**GROUPED, head_dim=8)),
    "phi": lambda: causal(hf.PhiConfig(**SIZES)),
    "phi3": lambda: causal(hf.Phi3Config(**GROUPED, **ENDS)),
    "gpt2": lambda: causal(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, **ENDS)),
    "gpt-neox": lambda: causal(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: causal(
        hf.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "falcon": lambda: causal(
        hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "vit": vit,
    "mixtral": lambda: causal(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
}


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model, deterministic: dropout of modules and of attention is 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def batch(model: nn.Module, b: int, s: int) -> dict[str, Any]:
    """Token ids [b, s], or images."""
    generator = torch.Generator().manual_seed(b * s)
    if getattr(model, "main_input_name", "") == "pixel_values":
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(b, 3, 16, 16, generator=generator).to(dtype)}
    ids = torch.randint(0, 64, (b, s), generator=generator)
    return {"input_ids": ids} | ({} if "Bert" in type(model).__name__ else {"use_cache": False})
