"""One rank: parallelize keeps the weights of a model that has some, and refuses other plans."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mist.errors import InputError, PlanError
from mist.exec import parallelize
from mist.exec.build.process_group import process_group
from mist.plans.file import load_plan
from mist.trace.models.loader import cross_entropy
from tests.exec.double import MAX_LOSS, in_double
from tests.exec.parity import settings


def model_of(file: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("own_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: nn.Module = module.build_model()
    return built


def main(plan_file: Path, model_file: Path) -> None:
    plan = load_plan(plan_file)
    torch.manual_seed(3)
    model = model_of(model_file)
    try:
        parallelize(model, plan)
    except InputError as error:
        assert str(error).startswith("parallelize needs a process group")
    with process_group(300.0), in_double():
        model.double()
        try:
            parallelize(model, replace(plan, model=replace(plan.model, fingerprint="sha256:no")))
        except PlanError as error:
            assert error.faults[0].path == "model.fingerprint"
        else:
            raise AssertionError("a plan for another model was taken")
        parallel = parallelize(model, plan, settings=settings(None))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        shape = (plan.workload.global_batch, plan.workload.seq_len)
        for number in range(3):
            torch.manual_seed(number)
            ids = torch.randint(0, 256, shape)
            loss = cross_entropy(model(ids), ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert abs(parallel.train_step(ids).loss - loss.item()) < MAX_LOSS


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
