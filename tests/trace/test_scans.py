"""Scans as kernels against the references that transformers has of them, and against their sources.

The products of a kernel are those of its reference, which torch's counter counts, but for what a
kernel does otherwise: stated with each. What the kernels keep is counted by hand from the
`save_for_backward` of their autograd functions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.dispatch_call import Call, bind, key_of
from mist.trace.operations.flops import work_of
from mist.trace.operations.known_scans import scans_as_kernels
from mist.trace.runs import SCANS

POINTS = [(1, 64), (2, 70), (2, 128), (3, 129), (1, 192)]
SETTING = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 16, 32
GROUPS, STATES, CHUNK = 2, 24, 64
CHANNELS = 40

Inputs = list[torch.Tensor]
Facts = tuple[tuple[int, int], int, tuple[torch.Tensor, ...]]


def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Inputs:
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def delta_inputs(b: int, s: int, key_heads: int = KEY_HEADS, *decays: int) -> Inputs:
    q, k, v, beta = made(
        (b, s, key_heads, KEY), (b, s, key_heads, KEY), (b, s, HEADS, VALUE), (b, s, HEADS)
    )
    (g,) = made((b, s, HEADS, *decays), dtype=torch.float32)
    return [q, k, v, g, beta]


def delta(inputs: Inputs) -> torch.Tensor:
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    return rule(*inputs, use_qk_l2norm_in_kernel=True)[0]  # type: ignore[no-any-return]


def channel_delta(inputs: Inputs) -> torch.Tensor:
    rule = modeling_kimi_linear.chunk_kimi_delta_attention
    return rule(*inputs, use_qk_l2norm_in_kernel=True)[0]  # type: ignore[no-any-return]


def duality_inputs(b: int, s: int, groups: int = GROUPS) -> Inputs:
    x, dt, of_states, read = made(
        (b, s, HEADS, VALUE), (b, s, HEADS), (b, s, groups, STATES), (b, s, groups, STATES)
    )
    return [x, dt, *made((HEADS,), dtype=torch.float32), of_states, read, *made((HEADS,), (HEADS,))]


def duality(inputs: Inputs) -> torch.Tensor:
    x, dt, a, of_states, read, skip, bias = inputs
    scan = modeling_mamba2.mamba2_chunk_scan
    return scan(x, dt, a, of_states, read, chunk_size=CHUNK, D=skip, dt_bias=bias)  # type: ignore[no-any-return]


def selective_inputs(b: int, s: int) -> Inputs:
    u, dt, z = made(*[(b, CHANNELS, s)] * 3)
    (a,) = made((CHANNELS, STATES), dtype=torch.float32)
    return [u, dt, a, *made((b, STATES, s), (b, STATES, s), (CHANNELS,)), z]


def selective(inputs: Inputs) -> torch.Tensor:
    return modeling_mamba.mamba_selective_scan(*inputs)  # type: ignore[no-any-return]


class Products(TorchDispatchMode):
    """Adds up the FLOPs of all calls, by our rules."""

    flop = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[arg-type]
        self.flop += sum(int(work.flop) for work in work_of(Call(func, bind(func, args, {}), out)))
        return out


def of_kernels(scan: Callable[[Inputs], torch.Tensor], norm: nn.Module, inputs: Inputs) -> Facts:
    """FLOPs each way and bytes kept of a scan as kernels, and the gradients of its inputs."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[key_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with scans_as_kernels([norm]):
        with saved_tensors_hooks(pack, lambda tensor: tensor), Products() as products:
            out = scan(inputs)
        with Products() as back:
            gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    return (products.flop, back.flop), sum(kept.values()), gradients


def of_reference(scan: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> tuple[int, int]:
    """FLOPs each way of the reference on real tensors, by torch's counter."""
    with FlopCounterMode(display=False) as products:
        out = scan(inputs)
    with FlopCounterMode(display=False) as back:
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return products.get_total_flops(), back.get_total_flops()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scan, FLOPs each way that it has beyond its reference, and bytes it keeps, by (b, s).

    `norm`: a module whose class lies where the scan does.
    """

    inputs: Callable[[int, int], Inputs]
    scan: Callable[[Inputs], torch.Tensor]
    norm: Callable[[], nn.Module]
    more_flop: Callable[[int, int], tuple[int, int]]
    kept_bytes: Callable[[int, int], int]


def num_chunks(s: int) -> int:
    return -(-s // CHUNK)


def ends_flop(b: int) -> int:
    """Gradients of the state before the first chunk, and of the one after the last.

    The kernels do not spare them: two products each, for a gradient and for what it goes back to.
    """
    return b * HEADS * 4 * 2 * CHUNK * KEY * VALUE


def delta_more(b: int, s: int) -> tuple[int, int]:
    """The kernels invert where the reference solves, which torch's counter passes over.

    Forward: the inverse, and its products with keys and values. Back: these products and the states
    of the chunks again, queries by keys twice and keys by keys once; through the inverse a gradient
    of each of its products that the reference solves for, and two products of squares.
    """
    square, of_keys, of_values = CHUNK**2, KEY * CHUNK**2, VALUE * CHUNK**2
    inverse = CHUNK * (square - 1) // 3
    back = 2 * (of_keys + of_values) + 2 * CHUNK * KEY * VALUE + 3 * of_keys + 2 * CHUNK * square
    each = b * HEADS * num_chunks(s)
    return each * (inverse + 2 * (of_keys + of_values)), each * 2 * back + ends_flop(b)


def channel_more(b: int, s: int) -> tuple[int, int]:
    """The reference multiplies the inverse, as the kernels, but takes both scores by elements.

    Forward: the inverse and both scores. Back: the products with the inverse and the states of the
    chunks again, four gradients of scores, and two products of squares.
    """
    square, of_keys, of_values = CHUNK**2, KEY * CHUNK**2, VALUE * CHUNK**2
    inverse = CHUNK * (square - 1) // 3
    back = of_keys + of_values + 2 * CHUNK * KEY * VALUE + 4 * of_keys + 2 * CHUNK * square
    each = b * HEADS * num_chunks(s)
    return each * (inverse + 2 * 2 * of_keys), each * 2 * back + ends_flop(b)


def duality_more(b: int, s: int) -> tuple[int, int]:
    """Scores of each group, not each head; states passed on, not summed over all earlier ones.

    Back: scores and states again, and the products of gradients and inputs a second time, for the
    decay.
    """
    chunks = num_chunks(s)
    scores, states = CHUNK * CHUNK * STATES, CHUNK * VALUE * STATES
    fewer = b * chunks * (HEADS - GROUPS) * 2 * scores
    passed = 2 * b * HEADS * (chunks + 1) ** 2 * VALUE * STATES
    again = GROUPS * scores + HEADS * (states + CHUNK * CHUNK * VALUE)
    return -fewer - passed, 2 * b * chunks * again - 2 * (fewer + passed)


def selective_more(b: int, s: int) -> tuple[int, int]:
    """The product of states and c is all that torch's counter sees of nine FLOPs for each state."""
    states = b * CHANNELS * s * STATES
    return (9 - 2) * states, (18 - 4) * states


def delta_kept(b: int, s: int) -> int:
    """Unit queries and keys with their lengths, values, decay, beta, and the inverse."""
    heads = 2 * VALUE + 4 + 2 + 2 * 64
    return b * s * (2 * KEY_HEADS * (2 * KEY + 4) + HEADS * heads)


def channel_kept(b: int, s: int) -> int:
    """As of one decay a head, both decays of each channel, and the scores, too."""
    return b * s * HEADS * (2 * (2 * KEY + 4) + 2 * VALUE + 2 * 4 * KEY + 2 + 2 * 2 * 64)


def duality_kept(b: int, s: int) -> int:
    """x, its result, dt, the groups, the decay of whole chunks, and what has one value a head."""
    tokens = b * s * (2 * 2 * HEADS * VALUE + 2 * HEADS + 2 * 2 * GROUPS * STATES)
    return tokens + b * num_chunks(s) * CHUNK * HEADS * 4 + HEADS * (4 + 2 + 2)


def selective_kept(b: int, s: int) -> int:
    """u, dt, the gate and what it is multiplied by, b and c, one piece's states; a and the skip."""
    tokens = b * s * (4 * 2 * CHANNELS + 2 * 2 * STATES)
    return tokens + b * CHANNELS * 2 * STATES * 4 + CHANNELS * (4 * STATES + 2)


CASES = [
    pytest.param(
        Case(
            inputs=delta_inputs,
            scan=delta,
            norm=lambda: modeling_qwen3_next.Qwen3NextRMSNorm(4),
            more_flop=delta_more,
            kept_bytes=delta_kept,
        ),
        id="gated delta rule",
    ),
    pytest.param(
        Case(
            inputs=lambda b, s: delta_inputs(b, s, HEADS, KEY),
            scan=channel_delta,
            norm=lambda: modeling_kimi_linear.KimiLinearRMSNorm(4),
            more_flop=channel_more,
            kept_bytes=channel_kept,
        ),
        id="kimi delta attention",
    ),
    pytest.param(
        Case(
            inputs=duality_inputs,
            scan=duality,
            norm=lambda: modeling_mamba2.Mamba2RMSNorm(4),
            more_flop=duality_more,
            kept_bytes=duality_kept,
        ),
        id="state space duality",
    ),
    pytest.param(
        Case(
            inputs=selective_inputs,
            scan=selective,
            norm=lambda: modeling_mamba.MambaRMSNorm(4),
            more_flop=selective_more,
            kept_bytes=selective_kept,
        ),
        id="selective scan",
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_a_scan_cost_what_their_source_says(case: Case) -> None:
    for b, s in POINTS:
        known = of_reference(case.scan, case.inputs(b, s))
        with FakeTensorMode():
            inputs = case.inputs(b, s)
            flop, kept_bytes, gradients = of_kernels(case.scan, case.norm(), inputs)
        more = case.more_flop(b, s)
        assert flop == (known[0] + more[0], known[1] + more[1]), (b, s)
        assert kept_bytes == case.kept_bytes(b, s), (b, s)
        assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in inputs]


class Mixer(nn.Module):
    """A layer whose scan is an attribute, and has the names of the kernel's own arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Linear(HEADS * VALUE, 3 * HEADS * VALUE)
        self.gates = nn.Linear(HEADS * VALUE, 2 * HEADS)
        self.chunked = written_scan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, VALUE)) for each in self.width(x).chunk(3, -1))
        g, beta = self.gates(x).chunk(2, -1)
        return x + self.chunked(q, k, v, g.float(), beta)[0].flatten(2)


def written_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token after token."""
    state = initial_state
    outputs = []
    for i in range(q.shape[1]):
        written = k[:, i, :, :, None] * (v[:, i] * beta[:, i, :, None])[:, :, None]
        state = written if state is None else state * g[:, i, :, None, None].exp() + written
        outputs.append((q[:, i, :, None] @ state.to(q.dtype)).squeeze(2))
    return torch.stack(outputs, 1), state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, HEADS * VALUE)
        self.layers = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Linear(HEADS * VALUE, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_a_scan_written_by_hand_holds_at_any_length_and_is_named() -> None:
    graph = trace_model(Model(), SETTING)
    assert graph.blocks[0].domain == ()
    assert SCANS in graph.notes
    assert "mist.chunk_states" in {op.name for op in graph.blocks[0].ops}


def test_a_scan_that_is_given_a_state_stays_as_it_is() -> None:
    model = Mixer()
    q, k, v, beta = made(*[(1, 3, HEADS, VALUE)] * 3, (1, 3, HEADS))
    state = torch.zeros(1, HEADS, VALUE, VALUE)
    with scans_as_kernels([model]), Products() as products:
        _, after = model.chunked(q, k, v, beta.float(), beta, state)
    assert products.flop == 3 * HEADS * 2 * VALUE * VALUE
    assert after is not None and after.shape == state.shape
    assert model.chunked is written_scan


def test_a_scan_with_its_heads_first_stays_as_it_is() -> None:
    model, tokens = Mixer(), 2 * HEADS
    q, k, v, beta = made(*[(1, HEADS, tokens, VALUE)] * 3, (1, HEADS, tokens))
    with scans_as_kernels([model]), Products() as products:
        model.chunked(q, k, v, beta.float(), beta)
    assert products.flop == HEADS * tokens * 2 * VALUE * VALUE
