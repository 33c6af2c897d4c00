"""One rank of a measurement: takes every reading together with the others."""

import os
import platform
import resource
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from mist.errors import InputError, MistError
from mist.exec.build.process_group import process_group
from mist.exec.profiling import device_ops as ops
from mist.exec.profiling import host_overhead as layers
from mist.exec.profiling import links
from mist.exec.profiling.busy import Busy
from mist.exec.profiling.clock import Clock
from mist.exec.profiling.readings import Readings, Request
from mist.exec.run.launch import LOST
from mist.exec.run.run_log import say

Part = Callable[[Clock], None]

ON_DEVICE: Final[dict[str, Part]] = {
    "matrix products": ops.read_products,
    "attention": ops.read_attention,
    "attention kernels": ops.read_attention_kernels,
    "memory-bound operations": ops.read_memory_bound,
    "copies": ops.read_copies,
    "optimizer": ops.read_optimizer,
    "launches": ops.read_ahead,
    "layers": layers.read_layers,
}
BETWEEN: Final[dict[str, Part]] = {
    "collectives": links.read_collectives,
    "transfers": links.read_transfers,
    "overlap": links.read_beside,
    "waiting": links.read_waiting,
}
TIMEOUT_S: Final = 300.0
GPU_STATE: Final = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}


def main(argv: list[str]) -> int:
    """Run a rank; the exit code. Rank 0 writes the readings to the file named second."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    try:
        run(Request.parse(argv[0]), Path(argv[1]))
    except MistError as error:
        sys.stderr.write(f"mist: {error}\n")
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return LOST if dist.is_initialized() else 1
    return 0


def run(request: Request, out: Path) -> None:
    """Take all readings. Raises InputError for a device that is not there."""
    if (request.device == "cuda") is not torch.cuda.is_available():
        usable = "cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(
            f"--device {request.device}: mist apply would use {usable} here. Try --device {usable}."
        )
    with process_group(TIMEOUT_S) as device:
        torch.manual_seed(dist.get_rank())
        own_bytes, before = _own_bytes(device), Busy.now()
        clock = Clock.within(request, device)
        parts = ON_DEVICE | (BETWEEN if request.num_ranks > 1 else {})
        warm: dict[str, str | float] = {}
        for name, part in parts.items():
            if dist.get_rank() == 0:
                say(f"measuring {name}")
            part(clock)
            warm = warm or _gpu_state(device)  # behind the products, which drive it hardest
        others = clock.others_ratio(Busy.now().since(before))
        if dist.get_rank() == 0:
            about = _about(device) | {"own_bytes": own_bytes, "others_ratio": others} | warm
            readings = Readings(about=about, rows=tuple(clock.rows))
            out.write_text(readings.dump(), encoding="utf-8")


def _about(device: torch.device) -> dict[str, str | float]:
    """The machine in words, and its memory in bytes."""
    host_bytes = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "host_bytes": host_bytes,
            "bytes": float(properties.total_memory),
        }
    # On a CPU the ranks share the memory of the host.
    each = host_bytes / dist.get_world_size()
    return {"name": _processor(), "host_bytes": host_bytes, "bytes": each}


def _gpu_state(device: torch.device) -> dict[str, str | float]:
    """How a GPU is driven just now, as its driver says; nothing where that cannot be asked."""
    if device.type != "cuda":
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader,nounits"]
    try:
        reply = subprocess.run(
            [*command, f"--id=GPU-{uuid}"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return gpu_state(reply.stdout)


def gpu_state(reply: str) -> dict[str, str | float]:
    """What a line of numbers by nvidia-smi says; those that it does not know are left out."""
    figures: dict[str, str | float] = {}
    for name, word in zip(GPU_STATE.values(), reply.split(","), strict=False):
        with suppress(ValueError):
            figures[name] = float(word)
    return figures


def _own_bytes(device: torch.device) -> float:
    """Memory of a rank before it has tensors of its own."""
    if device.type != "cuda":
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # NCCL takes its buffers in the first collective; they are a rank's own.
    dist.all_reduce(torch.zeros(1, device=device))
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))


def _processor() -> str:
    """What Linux calls the processor, and how many there are."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
