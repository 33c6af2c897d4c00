"""Megatron's own parser and checks take an exported file, on a machine without a GPU.

megatron-core wants Python 3.12, whose typing has `override`, and asks the GPU for its kind.
"""

import os
import shlex
import sys
import typing
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
import typing_extensions

if not hasattr(typing, "override"):
    typing.override = typing_extensions.override
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0, name="H100")
torch.cuda.get_device_capability = lambda *_: (9, 0)

from megatron.training.arguments import parse_args, validate_args  # noqa: E402

# Transformer Engine needs a GPU; data, learning rate and tokenizer are the user's.
OWN = [
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"),
    *("--train-iters", "1", "--lr", "1e-4", "--tokenizer-type", "NullTokenizer", "--mock-data"),
]


def arguments_of(folder: Path, vocab_size: int, *more: str) -> Namespace:
    """The checked arguments of the export in a folder; WORLD_SIZE says for how many ranks."""
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    if "export CUDA_DEVICE_MAX_CONNECTIONS=1" in (folder / "launch.sh").read_text():
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    _, _, array = (folder / "megatron_arguments.sh").read_text().partition("=(")
    words = shlex.split(array.rpartition(")")[0], comments=True)
    sys.argv = ["pretrain_gpt.py", *words, *OWN, "--vocab-size", str(vocab_size), *more]
    return validate_args(parse_args(), {})
