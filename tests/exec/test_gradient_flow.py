"""Where gradients flow between chunks of layers: by autograd's own word on a whole run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mist.exec.build.empty_weights import load
from mist.exec.build.gradient_flow import flows_of
from mist.exec.build.model_structure import examine
from mist.plans.workload import Attention
from tests.exec.layouts import NUM_LAYERS, SEQ_LEN, TRAINED, write_models


@pytest.mark.parametrize("trained", TRAINED)
def test_chunks_know_what_has_a_gradient(trained: str, tmp_path: Path) -> None:
    write_models(tmp_path)
    source = str(tmp_path / f"{trained}.py")
    loaded = load(source, Attention.FLASH)
    structure = examine(loaded, SEQ_LEN)
    module = loaded.module.to_empty(device="cpu")
    given, gives = [], []

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        given.append(args[0].requires_grad)
        gives.append(out.requires_grad)

    for name in structure.layers:
        module.get_submodule(name).register_forward_hook(note)
    assert loaded.run(torch.zeros(2, SEQ_LEN, dtype=torch.int64)).requires_grad
    for start in range(NUM_LAYERS):
        for stop in range(start + 1, NUM_LAYERS + 1):
            flows = flows_of(loaded, structure, range(start, stop))
            assert flows.before is (start > 0 and given[start])
            assert flows.behind is (stop == NUM_LAYERS or gives[stop - 1])  # the loss always has
            assert flows.idle == gives[start:stop].count(False)
