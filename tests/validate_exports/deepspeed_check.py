"""Runs with DeepSpeed's Python: DeepSpeedConfig reads every exported JSON file on a fake world."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import json

import deepspeed
import deepspeed.comm.torch
import torch.distributed
from deepspeed.runtime.config import DeepSpeedConfig
from torch.testing._internal.distributed.fake_pg import FakeStore


class World:
    """The data-parallel world that a file was written for."""

    def __init__(self, tp: int) -> None:
        self.size = 16 // tp

    def get_data_parallel_world_size(self) -> int:
        return self.size


# It would compile an extension for shared memory, and wait for ever where a lock was left.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False)
files = sorted(Path(sys.argv[1]).glob("deepspeed/*/deepspeed.json"))
for path in files:
    data = json.loads(path.read_text())
    tp = data.get("tensor_parallel", {}).get("autotp_size", 1)
    config = DeepSpeedConfig(data, mpu=World(tp))
    assert config.train_batch_size == 128, path
    assert config.zero_config.stage == data["zero_optimization"]["stage"], path
print(f"deepspeed {deepspeed.__version__}: {len(files)} files accepted")
assert len(files) >= 12
