"""The numeric tests on other makes of CPU, which their libraries imitate.

MKL, ATen, oneDNN and NumPy choose their kernels by the instructions that a CPU has, and kernels
differ in the order in which they add up. Each setting here is one such choice; what passes under
all of them does not hang on the CPU. (The other way round is not shown: CPUs also differ in caches,
by which libraries cut products into blocks.)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMERIC = (
    "tests/exec/test_parity.py",
    "tests/exec/test_states.py",
    "tests/exec/test_parallelize.py",
    "tests/exec/test_dry_run.py",
    "tests/trace/test_tp_check.py",
    "tests/trace/test_exact.py",
    "tests/symbolic",
    "tests/platform",
    "tests/pareto",
    "tests/calibrate",
    "tests/test_golden.py",
)
SETTINGS = {
    "sse": {
        "MKL_CBWR": "COMPATIBLE",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    },
    "avx2": {
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    },
    "avx512f": {
        "MKL_CBWR": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}


def has(instructions: str) -> bool:
    """Whether this CPU has them: ATen does what it is told, and would crash."""
    return instructions == "sse" or instructions in Path("/proc/cpuinfo").read_text().split()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_do_not_hang_on_the_cpu(name: str) -> None:
    if not has(name):
        pytest.skip(f"this CPU has no {name}")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--timeout", "900", *NUMERIC],
        cwd=ROOT,
        env={**os.environ, **SETTINGS[name]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
