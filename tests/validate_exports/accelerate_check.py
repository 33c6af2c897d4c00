"""Runs with accelerate's Python: its own loader and classes read every exported YAML file."""

import sys
from pathlib import Path

import accelerate
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

files = sorted(Path(sys.argv[1]).glob("accelerate/*/accelerate.yaml"))
for path in files:
    loaded = load_config_from_file(str(path))  # refuses unknown keys at the top
    data = yaml.safe_load(path.read_text())
    prefix = "parallelism_config_"
    sizes = {k.removeprefix(prefix): v for k, v in data.get("parallelism_config", {}).items()}
    ParallelismConfig(**sizes)
    product = 1
    for size in sizes.values():
        product *= size
    assert not sizes or product == loaded.num_processes, (path, sizes)
    if data["distributed_type"] == "FSDP":
        words = {k.removeprefix("fsdp_"): v for k, v in data["fsdp_config"].items()}
        assert words.pop("fsdp_version", words.pop("version", None)) == 2
        words["cpu_offload"] = words.pop("offload_params")
        FullyShardedDataParallelPlugin(fsdp_version=2, **words)  # an unknown word is a TypeError
print(f"accelerate {accelerate.__version__}: {len(files)} files accepted")
assert len(files) >= 12
