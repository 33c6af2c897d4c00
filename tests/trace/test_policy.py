"""Policy "cuda" on fake CPU tensors against torch's own meta kernels of the operations a GPU runs.

A meta kernel describes the CUDA kernel: which tensors it makes, of which shape and dtype. What
autograd saves of the functions that a model calls must be what it saves of those operations.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mist.model.graph import B, Block, S
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, trace_model
from mist.trace.recording.shim import runs_as
from tests.trace.test_exact import llama
from tests.trace.test_repeated_blocks import WIDTH, Layer, Model

aten = torch.ops.aten
CUDA = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
Make = Callable[..., Tensor]
Saved = list[tuple[str, tuple[int, ...]]]


def saved_of(function: Callable[[Make], Tensor], device: str) -> Saved:
    """Dtype and shape of the storages saved, inputs and parameters among them; no scalars."""
    found: dict[int, Tensor] = {}

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device, requires_grad=grad)

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(make)
    kept = [tensor for tensor in found.values() if tensor.dim() > 0 and tensor.numel() > 2]
    assert out.requires_grad
    return sorted((str(tensor.dtype), tuple(tensor.shape)) for tensor in kept)


def imitated(function: Callable[[Make], Tensor]) -> Saved:
    with FakeTensorMode(), runs_as(CUDA):
        return saved_of(function, "cpu")


def heads(make: Make, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> list[Tensor]:
    """Queries, keys and values [b, heads, s, d] of a point."""
    d, dv, kv = sizes.get("d", 64), sizes.get("dv", sizes.get("d", 64)), sizes.get("kv", 4)
    k = sizes.get("k", 80)
    shapes = ((2, 4, 96, d), (2, kv, k, d), (2, kv, k, dv))
    return [make(*shape, dtype=dtype) for shape in shapes]


def flash(make: Make, *more: object, **sizes: int) -> Tensor:
    return aten._scaled_dot_product_flash_attention(*heads(make, **sizes), *more)[0]


def padded_flash(make: Make) -> Tensor:
    q, k, v = (F.pad(each, (0, 7)) for each in heads(make, d=25, k=96))
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.2)[0][..., :25]


def efficient(
    make: Make, dtype: torch.dtype, bias: bool = False, causal: bool = False, **sizes: int
) -> Tensor:
    q, k, v = heads(make, dtype, **sizes)
    given = make(2, 1, 96, 80, dtype=dtype, grad=False).expand(2, 4, 96, 80) if bias else None
    return aten._scaled_dot_product_efficient_attention(q, k, v, given, True, 0.0, causal)[0]


def scores(
    make: Make, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0, **sizes: int
) -> Tensor:
    """As aten._scaled_dot_product_attention_math is composed (transformers/attention.cpp).

    Queries and keys are scaled by the root each, in fp32; CUDA's dropout keeps a bool mask.
    """
    q, k, v = (each.float() for each in heads(make, dtype, **sizes))
    weights = (q * 0.5) @ (k * 0.5).transpose(-2, -1)
    weights = torch.softmax(weights, -1)
    if dropout:
        weights = aten.native_dropout(weights, dropout, True)[0]
    return (weights @ v).to(dtype)


def masked(make: Make) -> Tensor:
    mask = make(2, 1, 96, 80, grad=False)
    return F.scaled_dot_product_attention(*heads(make), attn_mask=mask)


def attend(make: Make, dtype: torch.dtype = torch.bfloat16, **options: object) -> Tensor:
    names = {"d", "dv", "kv", "k"}
    sizes = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return F.scaled_dot_product_attention(*heads(make, dtype, **sizes), **rest)


F32, BF16 = torch.float32, torch.bfloat16
# What a model calls, and the operation that a CUDA build runs for it (aten/src/ATen/native:
# dropout.cpp, layer_norm.cpp, transformers/attention.cpp; the order flash, efficient, math of
# cuda/sdp_utils.cpp).
CASES: dict[str, tuple[Callable[[Make], Tensor], Callable[[Make], Tensor]]] = {
    "flash": (lambda m: attend(m, k=96, is_causal=True), lambda m: flash(m, 0.0, True, k=96)),
    "flash with dropout": (lambda m: attend(m, dropout_p=0.1), lambda m: flash(m, 0.1, False)),
    "flash with fewer key heads": (
        lambda m: attend(m, kv=2, enable_gqa=True),
        lambda m: flash(m, kv=2),
    ),
    "flash of heads of 25": (lambda m: attend(m, d=25, k=96, is_causal=True), padded_flash),
    "efficient in fp32": (lambda m: attend(m, F32), lambda m: efficient(m, F32)),
    "efficient with a mask": (masked, lambda m: efficient(m, BF16, bias=True)),
    "efficient with other value heads": (
        lambda m: attend(m, F32, dv=48),
        lambda m: efficient(m, F32, dv=48),
    ),
    "efficient where a causal mask is not square": (
        lambda m: attend(m, is_causal=True),
        lambda m: efficient(m, BF16, causal=True),
    ),
    "math where key heads are broadcast": (lambda m: attend(m, kv=1), lambda m: scores(m, kv=1)),
    "math where heads are not aligned": (
        lambda m: attend(m, F32, d=25),
        lambda m: scores(m, F32, d=25),
    ),
    "math with dropout": (
        lambda m: attend(m, kv=1, dropout_p=0.1),
        lambda m: scores(m, kv=1, dropout=0.1),
    ),
    "dropout": (
        lambda m: F.dropout(m(8, 16), 0.1),
        lambda m: aten.native_dropout(m(8, 16), 0.1, True)[0],
    ),
    "layer norm": (
        lambda m: F.layer_norm(m(8, 16), (16,), m(16), m(16)),
        lambda m: aten.native_layer_norm(m(8, 16), (16,), m(16), m(16), 1e-5)[0],
    ),
    "layer norm, fp32": (
        lambda m: F.layer_norm(m(8, 16, dtype=F32), (16,), m(16, dtype=F32), m(16, dtype=F32)),
        lambda m: aten.native_layer_norm(
            m(8, 16, dtype=F32), (16,), m(16, dtype=F32), m(16, dtype=F32), 1e-5
        )[0],
    ),
    "group norm": (
        lambda m: F.group_norm(m(2, 8, 16), 2, m(8), m(8)),
        lambda m: aten.native_group_norm(m(2, 8, 16), m(8), m(8), 2, 8, 16, 2, 1e-5)[0],
    ),
    "batch norm": (
        lambda m: F.batch_norm(m(4, 8, 16), None, None, m(8), m(8), training=True),
        lambda m: aten.native_batch_norm(
            m(4, 8, 16), m(8), m(8), None, None, True, 0.1, 1e-5
        )[0],
    ),
    "softmax in fp32": (
        lambda m: m(8, 16).softmax(-1, dtype=F32),
        lambda m: aten._softmax(m(8, 16).float(), -1, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_are_those_of_the_meta_kernel(name: str) -> None:
    called, run = CASES[name]
    assert imitated(called) == saved_of(run, "meta")


def test_rms_norm_is_one_kernel() -> None:
    """What derivatives.yaml says of _fused_rms_norm: backward reads x, the weight and 1 / rms."""
    x, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 16), (16,))
    )
    _, rstd = aten._fused_rms_norm(x, [16], weight, 1e-5)
    kept = [(str(each.dtype), tuple(each.shape)) for each in (x, weight, rstd)]
    assert imitated(lambda m: F.rms_norm(m(8, 16), (16,), m(16))) == sorted(kept)


def test_fewer_key_heads_in_fp32_go_to_math() -> None:
    """The memory-efficient kernel takes no groups (sdp_utils.cpp): the scores are kept."""
    kept = imitated(lambda m: attend(m, F32, kv=2, enable_gqa=True))
    assert ("torch.float32", (8, 96, 80)) in kept or ("torch.float32", (2, 4, 96, 80)) in kept


def bytes_of(block: Block, op: str) -> list[object]:
    return [tensor.bytes for tensor in block.saved if tensor.op == op]


@pytest.mark.slow
def test_norms_written_out_become_one_kernel() -> None:
    """Of two norms, bf16, h = 128: x (2 h) and 1 / rms in fp32 (4), together 2 h + 4 per token.

    Written out: x in fp32 (4 h), 1 / rms (4), and the normed x before the weight (2 h).
    """
    written, fused = (
        trace_model(llama(torch.bfloat16, "meta"), TraceSetting(
            precision=Precision.BF16, attention=Attention.FLASH, fused_norms=each
        )).blocks[0]
        for each in (False, True)
    )  # fmt: skip
    assert bytes_of(written, "mist.fused_rms_norm") == []
    assert bytes_of(fused, "mist.fused_rms_norm") == [256 * B * S, 4 * B * S] * 2
    total = [sum(tensor.bytes for tensor in block.saved) for block in (written, fused)]
    assert (total[0] - total[1]).equals(2 * (6 - 2) * 128 * B * S)


def test_norms_of_torch_are_one_kernel_anyway() -> None:
    class Normed(Layer):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.norm = nn.RMSNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    (block,) = trace_model(Model([Normed(i) for i in range(2)]), CUDA).blocks
    assert bytes_of(block, "mist.fused_rms_norm") == [2 * WIDTH * B * S, 4 * B * S]


@pytest.mark.parametrize("keys", [80, 49])
def test_gradients_of_an_attention_bias_lie_as_torch_lays_them(keys: int) -> None:
    def gradients() -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        shapes = ((96, 64), (keys, 64), (keys, 32), (96, keys))
        q, k, v, bias = (torch.empty(2, 4, *shape) for shape in shapes)
        out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
        backward = aten._scaled_dot_product_efficient_attention_backward
        found = backward(out[0], q, k, v, bias, *out, 0.0, [True] * 4)
        return [(t.shape, t.stride(), t.untyped_storage().nbytes()) for t in found]

    with FakeTensorMode():
        known = gradients()
    with FakeTensorMode(), runs_as(CUDA):
        assert gradients() == known
