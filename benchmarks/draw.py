"""How long one rank takes to draw its part of a model's weights, and what memory it needs.

One rank of many that do not run: the process group moves nothing. Prints seconds, the bytes of the
shards (parameters, moments) and the most memory beyond them.

    python benchmarks/draw.py [MODEL=llama3-8b] [RANKS=8]
"""

import resource
import sys
import time

import torch

from mist.exec.build.adamw import Settings
from mist.exec.build.empty_weights import load
from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import assemble, initialise, subject_of
from mist.exec.dryrun.dry_run import fake_process_group
from mist.units import GIB, format_bytes
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question

SEQ_LEN = 2048


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Plan ZeRO-3 on so many GPUs, build the first rank, draw, print."""
    model = sys.argv[1] if len(sys.argv) > 1 else "llama3-8b"
    num_ranks = sys.argv[2] if len(sys.argv) > 2 else "8"
    torch.set_num_threads(1)
    question = Question(
        model=model, num_gpus=int(num_ranks), seq_len=SEQ_LEN, global_batch=int(num_ranks)
    )
    plan = check_layout(question, HandLayout(zero=3)).plan
    loaded = load(model, plan.workload.attention)
    with fake_process_group(0, int(num_ranks)):
        subject = subject_of(loaded, examine(loaded, SEQ_LEN), plan)
        parallel = assemble(subject, plan, torch.device("cpu"), Settings())
        states = [tensor for each in parallel.states(on_host=False).values() for tensor in each]
        shard_bytes = sum(tensor.untyped_storage().nbytes() for tensor in states)
        built, begin, worked = peak_bytes(), time.perf_counter(), time.process_time()
        initialise(parallel, subject, 7)
        seconds, worked_s = time.perf_counter() - begin, time.process_time() - worked
    print(
        f"{model}, one rank of {num_ranks} at ZeRO-3: drawn in {seconds:.1f} s "
        f"({worked_s:.1f} s of one processor); states "
        f"{format_bytes(shard_bytes)}; process {format_bytes(built)} before, "
        f"{format_bytes(peak_bytes())} at most, {(peak_bytes() - shard_bytes) / GIB:.2f} GiB over"
    )


if __name__ == "__main__":
    main()
