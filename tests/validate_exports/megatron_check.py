"""Runs with megatron-core's Python: Megatron's own parser and checks take every exported file."""

import os
import sys
from pathlib import Path

from megatron_args import arguments_of

os.environ.update(WORLD_SIZE="16", RANK="0")

from megatron.training.arguments import core_transformer_config_from_args

files = sorted(Path(sys.argv[1]).glob("megatron/*/megatron_arguments.sh"))
for path in files:
    parsed = arguments_of(path.parent, 128256)
    core_transformer_config_from_args(parsed)
    assert parsed.global_batch_size == 128, path
print(f"megatron-core: {len(files)} files accepted")
assert len(files) >= 12
