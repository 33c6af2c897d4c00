"""Operations of one device: matrix products, attention, memory-bound kernels, copies, AdamW.

Shapes: M, N, K of products; B batch, H heads, S sequence, K head size of attention; R rows and D
columns of the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Final

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mist.exec.build.adamw import AdamW, Settings, make_slots
from mist.exec.build.gradient_sync import clip_scale, global_norm
from mist.exec.build.host_copies import Swapper
from mist.exec.profiling.clock import Call, Clock
from mist.plans.workload import Precision

DTYPES: Final = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
FAST_RATIO: Final = 0.25  # of the fastest precision; the others get a small table
COLUMNS: Final = 1024
CHAIN: Final = 16  # tiny operations in a row


def read_products(clock: Clock) -> None:
    """Every precision: the grid of sizes that it is fast enough for."""
    probe = clock.sizes.probe
    rates = {p: 2 * probe**3 / _probe_s(clock, p) for p in DTYPES}
    for precision, rate in rates.items():
        fast = rate >= FAST_RATIO * max(rates.values())
        sizes = [s for s in clock.sizes.gemm if 2 * s**3 / rate <= clock.longest_s]
        sizes = sizes if fast else [s for s in sizes if s in clock.sizes.small_gemm]
        for m, n, k in product(sizes, repeat=3):
            calls = _products(clock.device, DTYPES[precision], m, n, k)
            size = DTYPES[precision].itemsize
            clock.read(
                f"gemm {precision}", {"m": m, "n": n, "k": k}, *calls, held_bytes=size * m * n
            )


def _probe_s(clock: Clock, precision: Precision) -> float:
    calls = _products(clock.device, DTYPES[precision], *[clock.sizes.probe] * 3)
    clock.warm(calls[0])
    return clock.read(f"probe {precision}", {}, *calls)


def _products(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> list[Call]:
    """The three layouts of training: output, gradient of the input, gradient of the weight."""
    a_MK, b_NK = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    b_KN, a_KM = b_NK.t().contiguous(), a_MK.t().contiguous()
    return [lambda: a_MK @ b_NK.t(), lambda: a_MK @ b_KN, lambda: a_KM.t() @ b_KN]


def read_attention(clock: Clock) -> None:
    """Forward and backward of causal attention, and one forward without a mask."""
    precision = clock.sizes.attention
    for sequences, seq, head in product(
        clock.sizes.sequences, _lengths(clock, precision), clock.sizes.head_dims
    ):
        sizes = {"sequences": sequences, "seq": seq, "head_dim": head}
        shape = (1, sequences, seq, head)
        inputs = q, k, v = [
            torch.randn(shape, device=clock.device, dtype=DTYPES[precision]).requires_grad_()
            for _ in range(3)
        ]
        forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        forward_s = clock.read(f"attention_forward {precision}", sizes, forward)
        both = _forward_and_back(forward, inputs)
        both_s = clock.read(f"attention_both {precision}", sizes, both)
        backward_s = max(both_s - forward_s, forward_s)  # it repeats the forward pass's products
        clock.note(f"attention_backward {precision}", sizes, backward_s)
    full = partial(F.scaled_dot_product_attention, q, k, v)
    clock.read(f"attention_full {precision}", sizes, full)


def read_attention_kernels(clock: Clock) -> None:
    """Forward and backward by each of torch's kernels, at the longest sequence: which is fastest.

    For readers of the readings: what is predicted is the one that torch picks by itself.
    """
    sizes, dtype = clock.sizes, DTYPES[clock.sizes.attention]
    seq = _lengths(clock, sizes.attention)[-1]
    shape = (1, sizes.sequences[0], seq, sizes.head_dims[-1])
    inputs = q, k, v = [
        torch.randn(shape, device=clock.device, dtype=dtype).requires_grad_() for _ in range(3)
    ]
    for kernel in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        with suppress(RuntimeError), sdpa_kernel(kernel):  # those that this device does not have
            forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            both = _forward_and_back(forward, inputs)
            clock.read(f"attention_by {kernel.name.lower()}", {"seq": seq}, both)


def _lengths(clock: Clock, precision: Precision) -> list[int]:
    """Sequence lengths that do not take too long; two at least."""
    sizes = clock.sizes
    shape = (1, sizes.sequences[-1], sizes.seq_lens[0], sizes.head_dims[-1])
    x = torch.randn(shape, device=clock.device, dtype=DTYPES[precision])
    forward = partial(F.scaled_dot_product_attention, x, x, x, is_causal=True)
    shortest_s = clock.read("probe attention", {}, forward)
    lengths = sizes.seq_lens
    quick_lengths = [s for s in lengths if shortest_s * (s / lengths[0]) ** 2 <= clock.longest_s]
    return quick_lengths if len(quick_lengths) > 1 else list(lengths[:2])


def _forward_and_back(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Call:
    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def read_memory_bound(clock: Clock) -> None:
    """One kernel of each class at several sizes; `bytes`: read and written, as a trace counts."""
    for num_bytes in clock.sizes.memory_bytes:
        rows = num_bytes // (4 * COLUMNS)
        x_RD, y_RD = (torch.randn(rows, COLUMNS, device=clock.device) for _ in range(2))
        for traffic, passes, calls in _kernels(x_RD, y_RD):
            clock.read(
                f"memory {traffic}", {"bytes": passes * num_bytes}, calls, held_bytes=num_bytes
            )
    tiny = torch.randn(8, device=clock.device, requires_grad=True)

    def chain() -> object:
        out = tiny
        for _ in range(CHAIN):
            out = out * 1.5
        return torch.autograd.grad(out, tiny, tiny)

    clock.read("kernel", {"kernels": 2 * CHAIN}, chain)


def _kernels(x_RD: torch.Tensor, y_RD: torch.Tensor) -> Iterator[tuple[str, float, Call]]:
    """Class, tensors of the size of x that are read and written, and the call."""
    scale_D, row_R1 = y_RD[0].clone(), y_RD[:, :1].clone()
    half = x_RD.shape[1] // 2
    yield "pointwise", 3, lambda: x_RD + y_RD
    yield "pointwise", 3, lambda: x_RD * y_RD
    yield "pointwise", 2, lambda: x_RD * scale_D
    yield "pointwise", 2, lambda: x_RD * row_R1
    yield "pointwise", 2, lambda: F.silu(x_RD)
    yield "pointwise", 2, lambda: torch.cat((x_RD[:, half:], x_RD[:, :half]), dim=-1)
    yield "pointwise", 3, lambda: torch.ops.aten.silu_backward(x_RD, y_RD)
    yield "reduction", 1, lambda: x_RD.mean(-1, keepdim=True)
    yield "reduction", 1, lambda: x_RD.sum(0)
    columns = [x_RD.shape[1]]
    normed = torch.native_layer_norm(x_RD, columns, scale_D, scale_D, 1e-5)
    backward = torch.ops.aten.native_layer_norm_backward
    yield "norm_forward", 2, lambda: torch.native_layer_norm(x_RD, columns, scale_D, scale_D, 1e-5)
    yield (
        "norm_backward",
        3,
        lambda: backward(y_RD, x_RD, columns, *normed[1:], scale_D, scale_D, [True] * 3),
    )
    logged = torch.log_softmax(x_RD, -1)
    slopes = torch.ops.aten._log_softmax_backward_data
    yield "softmax", 2, lambda: torch.log_softmax(x_RD, -1)
    yield "softmax", 3, lambda: slopes(y_RD, logged, -1, x_RD.dtype)
    picked_R = torch.randint(0, x_RD.shape[0], (x_RD.shape[0],), device=x_RD.device)
    rows, scattered = x_RD.shape[0], torch.ops.aten.embedding_dense_backward
    yield "gather", 2, lambda: F.embedding(picked_R, x_RD)
    yield "gather", 2, lambda: scattered(y_RD, picked_R, rows, -1, False)


def read_copies(clock: Clock) -> None:
    """From host memory to the device and back."""
    num_bytes = clock.sizes.memory_bytes[-1]
    on_device = torch.randn(num_bytes // 4, device=clock.device)
    on_host = torch.randn(on_device.shape, pin_memory=clock.device.type == "cuda")
    sizes = {"bytes": float(num_bytes)}
    clock.read("host_to_device", sizes, lambda: on_device.copy_(on_host))
    clock.read("device_to_host", sizes, lambda: on_host.copy_(on_device))


def read_optimizer(clock: Clock) -> None:
    """One step of AdamW with the norm for clipping; `params`: parameters updated."""
    parameters = {
        str(i): torch.nn.Parameter(torch.randn(clock.sizes.num_params, device=clock.device))
        for i in range(clock.sizes.num_tensors)
    }
    swapper = Swapper(clock.device)
    optimizer = AdamW(Settings(), swapper, list(make_slots(parameters, frozenset(), 0.0, swapper)))
    for each in parameters.values():
        each.grad = torch.randn_like(each)

    def step() -> None:
        norm = global_norm(parameters, 1, (), clock.device)
        optimizer.step(clip_scale(norm, 1.0))

    clock.read("optimizer", {"params": clock.sizes.num_tensors * clock.sizes.num_params}, step)


def read_ahead(clock: Clock) -> None:
    """How soon products return to the host, and when their work is done."""
    a_NN = torch.randn(clock.sizes.probe, clock.sizes.probe, device=clock.device)

    def several() -> None:
        for _ in range(CHAIN):
            a_NN @ a_NN

    clock.note("product waits", {}, clock.waits_ratio(several))
