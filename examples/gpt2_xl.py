"""GPT-2 XL (Radford et al. 2019) with the transformers library; its embedding is tied to the head.

mist plan examples/gpt2_xl.py --gpus 8
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

name = "gpt2-xl"


def build_model() -> torch.nn.Module:
    """The model to plan; Mist builds it on the meta device, so no weights are made."""
    config = GPT2Config(
        vocab_size=50257,
        n_positions=1024,
        n_embd=1600,
        n_layer=48,
        n_head=25,
    )
    return GPT2LMHeadModel(config)
