"""Runs with torchtitan's Python: its own ConfigManager and ParallelDims take every package."""

import sys
from importlib import invalidate_caches
from pathlib import Path

from torchtitan.config import ConfigManager
from torchtitan.distributed import ParallelDims

RANKS, BATCH, SEQ_LEN = 16, 128, 4096
packages = sorted(Path(sys.argv[1]).resolve().glob("torchtitan/*"))
for folder in packages:
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.startswith("mist_plan")]:
        del sys.modules[name]
    invalidate_caches()
    config = ConfigManager().parse_args(["--module", "mist_plan", "--config", "mist_plan"])
    assert Path(sys.modules["mist_plan"].__file__).parents[1] == folder, folder
    # It checks the product of all sizes.
    sizes = ParallelDims.from_config(config.parallelism, RANKS)
    training = config.training
    step = training.local_batch_size * sizes.dp_replicate * sizes.dp_shard
    assert training.global_batch_size == BATCH, folder
    assert training.seq_len == SEQ_LEN, folder
    assert BATCH % step == 0, (folder, step)
    parts = config.parallelism.module_fqns_per_model_part
    if parts is not None:
        layers = [name for part in parts for name in part if name.startswith("layers.")]
        assert layers == [f"layers.{n}" for n in range(32)], (folder, layers)
    sys.path.remove(str(folder))
print(f"torchtitan: {len(packages)} packages accepted")
assert len(packages) >= 12
