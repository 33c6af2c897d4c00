"""Wall time and peak memory of whole commands, each in a fresh process.

python benchmarks/commands.py prints a row per command: cold (an empty trace cache) or cached,
seconds of wall time, peak resident memory, and for plans the seconds of the search alone.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024.0

PLANS = [
    ["examples/llama3_8b.py", "--gpus", "16"],
    ["llama3-70b", "--gpus", "512", "--global-batch", "512"],
    ["llama3-405b", "--gpus", "1024", "--global-batch", "1024"],
]


def run(arguments: list[str], home: str) -> tuple[float, float, str]:
    """Wall seconds, peak MiB and standard output of `mist` with these arguments."""
    environment = {**os.environ, "XDG_CACHE_HOME": home, "OMP_NUM_THREADS": "1"}
    code = (
        "import resource, sys, mist.cli\n"
        "try: mist.cli.main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wall_s = time.perf_counter() - start
    return wall_s, int(done.stderr.split()[-1]) / MIB, done.stdout


def report(label: str, arguments: list[str], home: str) -> None:
    wall_s, peak_mib, output = run(arguments, home)
    search = ""
    if "--json" in arguments and arguments[0] == "plan":
        search = f"search {json.loads(output)['seconds']['search']:.2f} s"
    words = " ".join(Path(word).name for word in arguments[:4])
    print(f"{label:6} {wall_s:6.2f} s {peak_mib:7.0f} MiB  {words:45} {search}")


def main() -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as home:
        plan = str(Path(home) / "plan.yaml")
        report("-", ["--help"], home)
        for arguments in PLANS:
            report("cold", ["plan", *arguments, "--json", "--out", plan], home)
            report("cached", ["plan", *arguments, "--json", "--out", plan], home)
        report("cached", ["check", plan], home)


if __name__ == "__main__":
    main()
