"""Published models by name, as the fields of their Hugging Face configurations.

Llama 3: Dubey et al. 2024 (arXiv 2407.21783), table 3, and the config.json that Meta published.
GPT-2: openai-community/gpt2-xl. GPT-3: Brown et al. 2020 (arXiv 2005.14165), table 2.1, as GPT-2
with 2048 positions.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final


def _llama3(hidden: int, ffn: int, layers: int, heads: int, **more: int) -> Mapping[str, Any]:
    fields = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return MappingProxyType(fields | more)


def _gpt(hidden: int, layers: int, heads: int, positions: int) -> Mapping[str, Any]:
    fields = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
    }
    return MappingProxyType(fields)


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama3-8b": _llama3(4096, 14336, 32, 32),
        "llama3-70b": _llama3(8192, 28672, 80, 64),
        "llama3-405b": _llama3(16384, 53248, 126, 128, max_position_embeddings=131072),
        "gpt2-xl": _gpt(1600, 48, 25, 1024),
        "gpt3-175b": _gpt(12288, 96, 96, 2048),
    }
)
