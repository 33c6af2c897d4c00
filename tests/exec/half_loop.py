"""One rank: a model whose weights are bf16 is trained by `parallelize` in fp32, all of it.

Then it is saved into a folder with checkpoints of more steps, changed, and read back.
"""

import json
import sys
from pathlib import Path

import torch

from mist.exec import parallelize
from mist.exec.build.adamw import Settings, local
from mist.exec.build.parallel import Parallel
from mist.exec.build.process_group import process_group
from mist.exec.run import checkpoints
from mist.exec.run.checkpoint_folder import last_of
from mist.plans.file import load_plan
from tests.exec.own_loop import model_of

NUM_STEPS, LR = 3, 1e-5


def main(plan_file: Path, model_file: Path) -> None:
    plan = load_plan(plan_file)
    torch.manual_seed(3)
    sys.path.insert(0, str(model_file.parent))
    model = model_of(model_file).bfloat16()
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    shape = (plan.workload.global_batch, plan.workload.seq_len)
    with process_group(300.0):
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
        save_and_resume(parallel, plan_file.parent / "saved")


def save_and_resume(parallel: Parallel, folder: Path) -> None:
    for step in (6, 9):
        path = folder / f"step-{step}"
        path.mkdir(parents=True)
        (path / "mist.json").write_text(json.dumps({"step": step}))
    checkpoints.save(parallel, folder, {})
    assert {path.name for path in folder.iterdir()} == {"step-9", f"step-{NUM_STEPS}"}
    tensors = [tensor for kind in parallel.states(on_host=False).values() for tensor in kind]
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    last = last_of(folder, {})
    assert last is not None
    assert checkpoints.resume(parallel, last) == NUM_STEPS
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert any(tensor.tolist() == [3.0, 4.0] for tensor in tensors)  # the buffer


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
