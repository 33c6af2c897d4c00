"""Llama 3 8B (Dubey et al. 2024, table 3) with the transformers library.

mist plan examples/llama3_8b.py --gpus 16
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

name = "llama3-8b"


def build_model() -> torch.nn.Module:
    """The model to plan; Mist builds it on the meta device, so no weights are made."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    return LlamaForCausalLM(config)
