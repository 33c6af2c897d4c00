"""Layers under torch.compile: what they keep against torch's own, traffic against Inductor's count.

The oracle runs the layer on real tensors under Dynamo with the same partitioner (backend
aot_eager_decomp_partition), with static shapes: its cut is made for each size anew.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import metrics
from torch._inductor.decomposition import select_decomp_table
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mist.model.graph import Block, OpKind
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.operations.fusion import kernels_of
from tests.trace.real import layer_inputs
from tests.trace.test_exact import (
    INPUTS,
    PATHS,
    Family,
    at,
    bert,
    family_graph,
    flop,
    gpt2,
    llama,
    mixtral,
    plain,
    saved_bytes,
    token_ids,
)  # fmt: skip

# Of torch's own imports, and of Dynamo where transformers caches a version.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
BF16 = torch.bfloat16
POINTS = [(3, 384), (2, 256), (3, 77), (2, 48), (1, 32)]
Run = Callable[..., object]


@cache
def block_of(family: Family, policy: str = "cpu") -> Block:
    setting = TraceSetting(
        precision=Precision.BF16, attention=Attention.FLASH, policy=policy, compiled=True
    )
    graph = trace_model(family(BF16, "meta"), setting)
    assert any(note.startswith("torch.compile") for note in graph.notes)
    (block,) = graph.blocks
    return block


def layer_of(family: Family, b: int, s: int) -> tuple[nn.Module, nn.Module, Any, Any]:
    model = family(BF16, "cpu")
    layer = model.get_submodule(PATHS[family])
    args, kwargs = layer_inputs(model, layer, INPUTS.get(family, token_ids)(b, s))
    return model, layer, (args[0].detach().requires_grad_(), *args[1:]), kwargs


def saved_by_torch(family: Family, b: int, s: int) -> int:
    """Bytes of the storages that autograd saves of a compiled layer, by hooks."""
    model, layer, args, kwargs = layer_of(family, b, s)
    others = (t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, torch.Tensor))
    given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *others)}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager_decomp_partition", dynamic=False)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(*args, **kwargs)
    del out
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in given)


def saved(family: Family, b: int, s: int) -> int:
    block = block_of(family)
    return saved_bytes(block.saved_single if b == 1 else block.saved, b, s)


@pytest.mark.parametrize(
    "family", [plain, *(pytest.param(f, marks=pytest.mark.slow) for f in (llama, bert))]
)
def test_what_is_kept_is_what_torch_keeps(family: Family) -> None:
    for b, s in POINTS:
        assert saved(family, b, s) == saved_by_torch(family, b, s), (b, s)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ratio"), [(gpt2, 0.012), (mixtral, 0.003)])
def test_a_cut_elsewhere_keeps_nearly_as_much(family: Family, ratio: float) -> None:
    """Our cut is made once, torch's for each size, and from Dynamo's graph.

    GPT-2 with attention scores moves the cut at short sequences (equal at the sizes of the trace);
    of Mixtral we keep one more column of routing.
    """
    for b, s in POINTS:
        real = saved_by_torch(family, b, s)
        assert real <= saved(family, b, s) <= (1 + ratio) * real, (b, s)


@pytest.mark.parametrize(
    "family", [plain, *(pytest.param(f, marks=pytest.mark.slow) for f in (llama, mixtral))]
)
def test_products_are_the_layers_own(family: Family) -> None:
    """Recomputation repeats no product: FLOPs equal those of torch's counter in eager mode."""
    eager = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH, policy="cpu")
    (block,) = family_graph(family, BF16, eager).blocks
    for phase in ("forward", "backward"):
        ours, theirs = (flop(each, phase, OpKind.GEMM, 2, 48) for each in (block_of(family), block))
        assert ours == theirs


def products_of_torch(*, recompute: bool) -> int:
    """How many matrix products the graphs of a Llama layer have, checkpointed within or not."""
    _, layer, args, kwargs = layer_of(llama, 2, 48)
    found: Counter[object] = Counter()

    def count(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        found.update(getattr(node.target, "overloadpacket", None) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def run(*inputs: object) -> object:
        if recompute:
            return checkpoint(layer, *inputs, use_reentrant=False, **kwargs)
        return layer(*inputs, **kwargs)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    out = torch.compile(run, backend=backend, dynamic=False)(*args)
    next(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)).sum().backward()
    return sum(found[name] for name in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.slow
def test_checkpointing_within_a_graph_repeats_what_torch_repeats() -> None:
    """The last product gives what nothing in the backward pass needs.

    Behind dropout we repeat it all the same: what runs again ends where the last saved tensor does.
    """
    block = block_of(llama)
    repeated = block.ops[: block.num_recomputed_ops]
    products = [op for op in repeated if op.kind is OpKind.GEMM]
    more = products_of_torch(recompute=True) - products_of_torch(recompute=False)
    assert len(products) == more
    forward = [op for op in block.ops if op.phase == "forward" and op.kind is OpKind.GEMM]
    assert more == len(forward) - 1


@pytest.mark.slow
def test_less_is_kept_and_less_is_moved_than_in_eager_mode() -> None:
    eager = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH, policy="cuda")
    (block,) = family_graph(llama, BF16, eager).blocks
    compiled = block_of(llama, "cuda")
    moved = [sum(at(op.traffic_bytes, 2, 512) for op in each.ops) for each in (compiled, block)]
    kept = [saved_bytes(each.saved, 2, 512) for each in (compiled, block)]
    assert moved[0] < 0.6 * moved[1]
    assert kept[0] < 0.75 * kept[1]
    assert all(tensor.op for tensor in compiled.saved)


@contextmanager
def counted() -> Iterator[None]:
    """Within: Inductor counts the bytes of its kernels."""
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    before = log.level
    log.setLevel(logging.INFO)
    torch._dynamo.reset()
    metrics.reset()
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            yield
    finally:
        log.setLevel(before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("family", [llama, gpt2, plain])
def test_traffic_is_a_close_lower_bound_of_inductors(family: Family) -> None:
    """Bytes that Inductor counts for its kernels and for products, forward and backward."""
    _, layer, args, kwargs = layer_of(family, 3, 384)
    with counted():
        out = torch.compile(layer, dynamic=False)(*args, **kwargs)
        forward = metrics.num_bytes_accessed
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        backward = metrics.num_bytes_accessed - forward
    for phase, real in (("forward", forward), ("backward", backward)):
        ops = [op for op in block_of(family).ops if op.phase == phase]
        assert 0.75 * real < sum(at(op.traffic_bytes, 3, 384) for op in ops) <= real


def graph_of(function: Run, *shapes: tuple[int, ...]) -> fx.Graph:
    inputs = [torch.empty(shape, dtype=BF16) for shape in shapes]
    return make_fx(function, tracing_mode="fake")(*inputs).graph


def charged(function: Run, *shapes: tuple[int, ...]) -> list[tuple[str, int, int]]:
    kernels = kernels_of(graph_of(function, *shapes)).items()
    return [(str(n), k.read_bytes, k.written_bytes) for n, k in kernels if k.charged]


X = (4, 8)  # 32 elements, 64 bytes


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: torch.exp(x) + 1, [("add", 64, 64)]),
        (lambda x, w: (x * x.float().pow(2).mean(-1, keepdim=True)).relu(), [("relu", 64, 128)]),
        # A product between: its input and its output are written.
        (lambda x, w: (x.relu() @ w).exp(), [("relu", 64, 64), ("exp", 64, 64)]),
        # What a product and a later kernel both take is written once, read again.
        (
            lambda x, w: (y := x.relu().exp()) @ w + y,
            [("exp", 64, 64), ("add", 128, 64)],
        ),
        (
            lambda x, w: (y := x.exp()).relu() @ w + y,
            [("relu", 64, 128), ("add", 128, 64)],
        ),
        # Views cost nothing; a transposed copy is a kernel.
        (lambda x, w: x.t().clone().relu(), [("relu", 64, 64)]),
        # Two results of one kernel read their input once.
        (lambda x, w: (x.relu(), x.relu().exp()), [("relu", 64, 64), ("exp", 64, 64)]),
    ],
)  # fmt: skip
def test_kernels_by_hand(function: Run, expected: list[tuple[str, int, int]]) -> None:
    assert charged(function, X, (8, 8)) == expected
