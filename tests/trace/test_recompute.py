"""What checkpointing runs again, against torch's own checkpoint on real tensors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mist.model.graph import OpKind
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting
from tests.fast_cases import first_fast
from tests.trace.real import layer_inputs
from tests.trace.test_exact import PATHS, Family, at, family_graph, gpt2, llama, token_ids


@pytest.mark.parametrize(("family", "whole"), first_fast([(llama, False), (gpt2, True)], width=2))
def test_recomputed_operations_are_those_that_torch_repeats(family: Family, whole: bool) -> None:
    """Llama's last product is not repeated; GPT-2's is: the dropout behind it saves its mask."""
    setting = TraceSetting(precision=Precision.FP32, attention=Attention.FLASH, policy="cpu")
    (block,) = family_graph(family, torch.float32, setting).blocks
    model = family(torch.float32, "cpu")
    layer = model.get_submodule(PATHS[family])
    b, s = 2, 48
    args, kwargs = layer_inputs(model, layer, token_ids(b, s))
    x = args[0].detach().requires_grad_()

    def flop(*, recompute: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            if recompute:
                out = checkpoint(layer, x, *args[1:], use_reentrant=False, **kwargs)
            else:
                out = layer(x, *args[1:], **kwargs)
            out.sum().backward()
        total: int = counter.get_total_flops()
        return total

    repeated = block.ops[: block.num_recomputed_ops]
    products = [at(op.flop, b, s) for op in repeated if op.kind is OpKind.GEMM]
    assert sum(products) == flop(recompute=True) - flop(recompute=False)
    forward = [op for op in block.ops if op.phase == "forward" and op.kind is OpKind.GEMM]
    assert (len(products) == len(forward)) is whole
