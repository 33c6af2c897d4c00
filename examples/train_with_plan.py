"""Your own training loop on a plan: three lines turn the model into its parallel form.

    mist plan examples/my_transformer.py --gpus 8 --out plan.yaml
    torchrun --nproc-per-node 8 examples/train_with_plan.py plan.yaml

Every rank runs this script and makes the whole batch of a step; each takes its own samples of it.
"""

import sys

import torch
import torch.distributed as dist
from my_transformer import VOCAB_SIZE, build_model

import mist
from mist.exec import deferred, parallelize

NUM_STEPS = 5


def main(plan_file: str) -> None:
    dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())

    plan = mist.load_plan(plan_file)
    with deferred():  # no memory for parameters until every rank knows its part
        model = build_model()
    parallel = parallelize(model, plan, seed=7)

    shape = (plan.workload.global_batch, plan.workload.seq_len)
    for number in range(NUM_STEPS):
        torch.manual_seed(number)
        step = parallel.train_step(torch.randint(0, VOCAB_SIZE, shape))
        if dist.get_rank() == 0:
            print(f"step {number + 1}: loss {step.loss:.4f}, gradient norm {step.norm:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
