"""Published models by name, as the fields of their Hugging Face configurations.

Each is the config.json that its authors published under the name in its comment. Llama 3 also:
Dubey et al. 2024 (arXiv 2407.21783), table 3. GPT-3 is Brown et al. 2020 (arXiv 2005.14165), table
2.1, as GPT-2 with 2048 positions. Fields that transformers has as its defaults are left out.
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


# Qwen/Qwen3-8B and Qwen/Qwen3-30B-A3B.
QWEN3: Final = MappingProxyType(
    {
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }
)
QWEN3_8B: Final = MappingProxyType(
    {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        **QWEN3,
    }
)
QWEN3_30B_A3B: Final = MappingProxyType(
    {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        **QWEN3,
    }
)
# mistralai/Mixtral-8x7B-v0.1.
MIXTRAL: Final = MappingProxyType(
    {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }
)
# deepseek-ai/DeepSeek-V3, without its multi-token prediction module.
DEEPSEEK_V3: Final = MappingProxyType(
    {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
    }
)
# google/gemma-2-9b: every other layer attends within 4096 tokens; scores are capped, so no flash.
GEMMA2_9B: Final = MappingProxyType(
    {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    }
)
# EleutherAI/gpt-neox-20b.
GPT_NEOX_20B: Final = MappingProxyType(
    {
        "model_type": "gpt_neox",
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "rotary_pct": 0.25,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
)
# facebook/opt-6.7b.
OPT_6_7B: Final = MappingProxyType(
    {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 4096,
        "max_position_embeddings": 2048,
    }
)
# microsoft/Phi-3-mini-4k-instruct.
PHI3_MINI: Final = MappingProxyType(
    {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "tie_word_embeddings": False,
    }
)
# tiiuae/falcon-7b.
FALCON_7B: Final = MappingProxyType(
    {
        "model_type": "falcon",
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "new_decoder_architecture": False,
        "max_position_embeddings": 2048,
    }
)
# google-bert/bert-large-uncased.
BERT_LARGE: Final = MappingProxyType(
    {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 30522,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 512,
    }
)
# google-t5/t5-large.
T5_LARGE: Final = MappingProxyType(
    {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 32128,
        "d_model": 1024,
        "d_ff": 4096,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 16,
        "n_positions": 512,
    }
)
# google/vit-large-patch16-224.
VIT_LARGE: Final = MappingProxyType(
    {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "num_labels": 1000,
    }
)

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama3-8b": _llama3(4096, 14336, 32, 32),
        "llama3-70b": _llama3(8192, 28672, 80, 64),
        "llama3-405b": _llama3(16384, 53248, 126, 128, max_position_embeddings=131072),
        "gpt2-xl": _gpt(1600, 48, 25, 1024),
        "gpt3-175b": _gpt(12288, 96, 96, 2048),
        "qwen3-8b": QWEN3_8B,
        "qwen3-30b-a3b": QWEN3_30B_A3B,
        "mixtral-8x7b": MIXTRAL,
        "deepseek-v3": DEEPSEEK_V3,
        "gemma2-9b": GEMMA2_9B,
        "gpt-neox-20b": GPT_NEOX_20B,
        "opt-6.7b": OPT_6_7B,
        "phi3-mini": PHI3_MINI,
        "falcon-7b": FALCON_7B,
        "bert-large": BERT_LARGE,
        "t5-large": T5_LARGE,
        "vit-large": VIT_LARGE,
    }
)
