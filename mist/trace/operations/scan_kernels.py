"""The kernels that scans over a sequence run as on a GPU: what each writes and multiplies.

Models carry such scans in a reference form that no one trains with: Python loops over chunks, or
over tokens. A row here is one kernel of the package that models take in its place, as it stands
there: its results, and its matrix products for each batch, chunk and head. Nothing is computed.

Letters are sizes. Gated delta rule (flash-linear-attention, fla/ops/gated_delta_rule and kda; Yang
et al. 2024, arXiv 2412.06464): b samples, s tokens, c tokens of a chunk, n chunks, q heads of
queries and keys, h of values, k and v sizes of a key and a value. State space duality (mamba_ssm,
ops/triton/ssd_combined.py; Dao and Gu 2024, arXiv 2405.21060): h heads of size p, d states, g
groups, z tokens padded to whole chunks. Selective scan (mamba_ssm, csrc/selective_scan; Gu and Dao
2023, arXiv 2312.00752): e channels, d states, m states that are kept of the pieces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Final

import torch
import torch.library
from torch._ops import OpOverload, OpOverloadPacket

from mist.model.graph import OpKind
from mist.trace.dispatch_call import Call
from mist.trace.expressions import Size
from mist.trace.operations.work import Work, gemm

FP32: Final = "fp32"


@dataclass(frozen=True, slots=True)
class ScanKernel:
    """`writes`: results, "bshk" in the dtype of the first input or "bshk fp32" in its own.

    `products`: "bnh ckv" is a product [c, v] by [v, k] for each of b n h. `inverse`: batches and
    rows of unit triangular matrices that it inverts. `flop_each`: FLOPs for each combination of
    the sizes `elements`, of a kernel without products.
    """

    writes: tuple[str, ...]
    products: tuple[str, ...] = ()
    inverse: str = ""
    elements: str = ""
    flop_each: int = 0


def _in_chunks(*products: str) -> tuple[str, ...]:
    return tuple(f"bnh {each}" for each in products)


# Of u, dt, a, b, c, skip, dt_bias.
SCAN_GRADIENTS: Final = ("bes", "bes", "ed fp32", "bds fp32", "bds fp32", "e fp32", "e fp32")

SCAN_KERNELS: Final[Mapping[str, ScanKernel]] = MappingProxyType(
    {
        # Queries or keys over their lengths: the unit vectors and 1 / length.
        "unit_vectors": ScanKernel(("bsqk", "bsq fp32")),
        "unit_vectors_backward": ScanKernel(("bsqk",)),
        "decay_in_chunks": ScanKernel(("bsh fp32",)),
        "keys_solve": ScanKernel(("bshc",), _in_chunks("cck"), inverse="bnh c"),
        "keys_and_values": ScanKernel(("bshk", "bshv"), _in_chunks("ckc", "cvc")),
        "chunk_states": ScanKernel(("bnhkv", "bshv"), _in_chunks("cvk", "kvc")),
        "chunk_outputs": ScanKernel(("bshv",), _in_chunks("cvk", "cck", "cvc")),
        "values_backward": ScanKernel(("bshv",), _in_chunks("cck", "cvc")),
        "chunk_states_backward": ScanKernel(("bnhkv", "bshv"), _in_chunks("cvk", "kvc", "kvc")),
        "chunk_outputs_backward": ScanKernel(
            ("bshk", "bshk", "bshk", "bsh fp32"),
            _in_chunks("ccv", "ckv", "ckv", "ckv", "cck", "ckc", "ckc"),
        ),
        "keys_solve_backward": ScanKernel(
            ("bshk", "bshv", "bsh fp32", "bsh fp32"),
            _in_chunks("cck", "ckc", "ccv", "cvc", "ccc", "ccc", "cck", "ckc", "ckc"),
        ),
        # With a decay for each channel of a key (Kimi Delta Attention).
        "channel_decay_in_chunks": ScanKernel(("bshk fp32",)),
        "channel_keys_solve": ScanKernel(
            ("bshk", "bshv", "bshk", "bshc", "bshc"),
            _in_chunks("cck", "cck", "ckc", "cvc"),
            inverse="bnh c",
        ),
        "channel_keys_and_values": ScanKernel(
            ("bshk", "bshv", "bshk", "bshk"), _in_chunks("ckc", "cvc")
        ),
        "channel_outputs": ScanKernel(("bshv",), _in_chunks("cvk", "cvc")),
        "channel_values_backward": ScanKernel(("bshv", "bshc fp32"), _in_chunks("ccv", "cvc")),
        "channel_outputs_backward": ScanKernel(
            ("bshk fp32", "bshk fp32", "bshv", "bshk fp32", "bsh fp32", "bshc fp32"),
            _in_chunks("ckv", "ckv", "ckv", "ccv", "cvc", "cck", "ckc", "ccc", "ccc"),
        ),
        "channel_keys_solve_backward": ScanKernel(
            ("bshk fp32", "bshk fp32", "bsh fp32", "bshk fp32"),
            _in_chunks("ckc", "ckc", "ckc", "ckc"),
        ),
        # State space duality.
        "ssd_decay": ScanKernel(("bzh fp32", "bzh fp32")),
        "ssd_states": ScanKernel(("bnhpd fp32",), _in_chunks("pdc")),
        "ssd_pass_states": ScanKernel(("bnhpd", "bhpd fp32")),
        "ssd_scores": ScanKernel(("bngcc fp32",), ("bng ccd",)),
        "ssd_outputs": ScanKernel(("bshp",), _in_chunks("cpd", "cpc")),
        "ssd_states_backward": ScanKernel(("bnhpd fp32",), _in_chunks("pdc")),
        "ssd_pass_states_backward": ScanKernel(("bnhpd", "bnhpd", "bnh fp32")),
        "ssd_inputs_backward": ScanKernel(("bshp", "bzh fp32", "h fp32"), _in_chunks("cpd", "cpc")),
        "ssd_group_states_backward": ScanKernel(("bsgd fp32", "bzh fp32"), _in_chunks("cdp")),
        "ssd_scores_backward": ScanKernel(("bngcc fp32",), _in_chunks("ccp")),
        "ssd_groups_backward": ScanKernel(("bsgd",), ("bng cdc",)),
        "ssd_decay_of_scores_backward": ScanKernel(("bzh fp32",), _in_chunks("ccp")),
        "ssd_decay_backward": ScanKernel(("bsh", "h fp32", "h fp32")),
        # A multiply-add and an exponential for each state and token, and what makes their operands:
        # 9 FLOPs (state-spaces/mamba, issue 110); the way back repeats the scan and goes back.
        "selective_scan": ScanKernel(("bes", "bemd fp32"), elements="besd", flop_each=9),
        "gated_scan": ScanKernel(("bes", "bemd fp32", "bes"), elements="besd", flop_each=9),
        "selective_scan_backward": ScanKernel(
            SCAN_GRADIENTS, elements="besd", flop_each=18
        ),
        "gated_scan_backward": ScanKernel(
            (*SCAN_GRADIENTS, "bes"), elements="besd", flop_each=18
        ),
        # A recurrent layer (see `recurrent`): inputs of all tokens at once, then token by token.
        "recurrent_layer": ScanKernel(("pqo", "dbh", "dbh", "tr"), ("d tgi", "ds bgh")),
        "recurrent_layer_backward": ScanKernel(
            ("pqi", "dbh", "dbh", "dtg"), ("ds bhg", "d tig")
        ),
        "recurrent_weights": ScanKernel(("gi", "gh", "g", "g"), ("d git", "d ght")),
    }
)  # fmt: skip

_LIBRARY: Final = torch.library.Library("mist", "FRAGMENT")
_SCHEMA: Final = "(Tensor[] inputs, str letters, SymInt[] sizes) -> Tensor[]"


def _defined(name: str, kernel: ScanKernel) -> OpOverload:
    """An operation of the name, which makes tensors in the shapes of its results."""
    _LIBRARY.define(f"{name}{_SCHEMA}")

    def results(
        inputs: Sequence[torch.Tensor], letters: str, sizes: Sequence[Size]
    ) -> list[torch.Tensor]:
        size_of = dict(zip(letters, sizes, strict=True))
        first = inputs[0]
        made = []
        for each in kernel.writes:
            shape, _, is_wide = each.partition(" ")
            dtype = torch.float32 if is_wide else first.dtype
            made.append(first.new_empty([size_of[letter] for letter in shape], dtype=dtype))
        return made

    torch.library.register_fake(f"mist::{name}", results, lib=_LIBRARY)
    operation: OpOverload = getattr(torch.ops.mist, name).default
    return operation


SCAN_OPS: Final[Mapping[OpOverloadPacket, str]] = MappingProxyType(
    {_defined(name, kernel).overloadpacket: name for name, kernel in SCAN_KERNELS.items()}
)


def scan_kernel(
    name: str, inputs: Sequence[torch.Tensor | None], sizes: Mapping[str, Size]
) -> list[torch.Tensor]:
    """Run the kernel of a name on its inputs (None: none), with the sizes of its letters."""
    given = [each for each in inputs if each is not None]
    operation = getattr(torch.ops.mist, name).default
    made: list[torch.Tensor] = operation(given, "".join(sizes), list(sizes.values()))
    return made


def scan_work(call: Call) -> list[Work]:
    """The matrix products of one call of a kernel."""
    kernel = SCAN_KERNELS[SCAN_OPS[call.func.overloadpacket]]
    letters, sizes = call.arguments["letters"], call.arguments["sizes"]
    assert isinstance(letters, str) and isinstance(sizes, list | tuple)
    size_of: dict[str, Size] = dict(zip(letters, sizes, strict=True))
    works = []
    for batches, dims in map(str.split, kernel.products):
        works.append(gemm(_product(batches, size_of), *(size_of[letter] for letter in dims)))
    if kernel.inverse:
        batches, row = kernel.inverse.split()
        works.append(_inverse(_product(batches, size_of), size_of[row]))
    if kernel.elements:
        flop = kernel.flop_each * _product(kernel.elements, size_of)
        works.append(Work(OpKind.MEMORY, (), flop))
    return works


def _product(letters: str, size_of: Mapping[str, Size]) -> Size:
    return prod(size_of[letter] for letter in letters)


def _inverse(batch: Size, n: Size) -> Work:
    """The inverse of unit triangles [n, n]: i - j multiply-adds for each element i > j of it.

    That is n (n^2 - 1) / 6, about a sixth of a product [n, n] by [n, n].
    """
    return Work(OpKind.GEMM, (batch, n, n, n // 6), batch * (n * (n * n - 1) // 3))
