"""Runs with megatron-core's Python: Megatron's own parser and checks take every exported file.

megatron-core wants Python 3.12, whose typing has `override`, and asks the GPU for its kind.
"""

import os
import shlex
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import torch
import typing_extensions

if not hasattr(typing, "override"):
    typing.override = typing_extensions.override
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0, name="H100")
torch.cuda.get_device_capability = lambda *_: (9, 0)

from megatron.training.arguments import (  # noqa: E402 - after what it needs is there
    core_transformer_config_from_args,
    parse_args,
    validate_args,
)

os.environ.update(WORLD_SIZE="16", RANK="0")
files = sorted(Path(sys.argv[1]).glob("megatron/*/megatron_arguments.sh"))
for path in files:
    launch = path.with_name("launch.sh").read_text()
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    if "export CUDA_DEVICE_MAX_CONNECTIONS=1" in launch:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    _, _, array = path.read_text().partition("=(")
    words = shlex.split(array.rpartition(")")[0], comments=True)
    sys.argv = ["pretrain_gpt.py", *words, "--transformer-impl", "local", "--no-persist-layer-norm"]
    sys.argv += ["--no-rope-fusion"]
    sys.argv += ["--train-iters", "1", "--lr", "1e-4", "--vocab-size", "128256"]
    sys.argv += ["--tokenizer-type", "NullTokenizer", "--mock-data"]
    parsed = validate_args(parse_args(), {})
    core_transformer_config_from_args(parsed)
    assert parsed.global_batch_size == 128, path
print(f"megatron-core: {len(files)} files accepted")
assert len(files) >= 12
