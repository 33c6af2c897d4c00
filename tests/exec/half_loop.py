"""One rank: a model whose weights are bf16 is trained by `parallelize` in fp32, all of it."""

import sys
from pathlib import Path

import torch

from mist.exec import parallelize
from mist.exec.adamw import Settings, local
from mist.exec.group import joined
from mist.planfile import load_plan
from tests.exec.own_loop import model_of

NUM_STEPS, LR = 3, 1e-5


def main(plan_file: Path, model_file: Path) -> None:
    plan = load_plan(plan_file)
    torch.manual_seed(3)
    model = model_of(model_file).bfloat16()
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    shape = (plan.workload.global_batch, plan.workload.seq_len)
    with joined(25.0):
        parallel = parallelize(model, plan, settings=Settings(lr=LR))
        moved = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}
        for number in range(NUM_STEPS):
            torch.manual_seed(number)
            parallel.train_step(torch.randint(0, 256, shape))
            for name, parameter in parallel.parameters.items():
                moved[name] |= local(parameter.detach()) != before[name]
        states = parallel.states(on_host=False)
        assert {t.dtype for t in states["parameters"] + states["optimizer"]} == {torch.float32}
        for name, elements in moved.items():
            assert elements.all(), f"{name}: {elements.float().mean():.3f} of it moved"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
