"""What one tensor-parallel rank of a layer does as torch's DTensor runs it: no number from mist.

`python -m tests.trace.dtensor_oracle BATCH SEQ FAMILY...` prints a JSON list of `Measured`. Torch's
own parallelize_module divides a layer over a fake process group of t ranks; the layer runs on fake
tensors, and rank 0 sees its local operations, collectives and saved tensors. Mode "tp" divides the
matrices, "sp" also the sequence between them (Korthikanti et al. 2022). From mist comes only the
shim, which has fake CPU tensors take the operations of a GPU.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting
from mist.trace.recording.shim import runs_as
from tests.trace.real import Start, Watch, convolution_gradients, layer_inputs

Mode = Literal["tp", "sp"]
DEGREES: Final = (1, 2, 4, 8)
HIDDEN: Final = 256
HALF: Final = torch.bfloat16
BF16: Final = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
FLOP: Final = flop_registry | {
    torch.ops.aten.convolution_backward: shape_wrapper(convolution_gradients)
}
SEQ_DIM: Final = 1  # activations are [batch, sequence, hidden]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A small model and, by module of its layer, what tensor parallelism does.

    `regions`: a module whose input enters column-parallel matrices, and the keyword by which it
    gets it ("" when by position). `post_norm`: what a norm gives is added to other tensors, which
    are local ones. `over_heads`: norms over what columns give. `entrance`: a module whose
    result enters several. `modes`: without "sp" where a part
    of the layer is whole. `traced`: the model of which this one is a copy that DTensor can divide.
    """

    build: Callable[[], nn.Module]
    layer: str
    colwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    norms: tuple[str, ...]
    regions: Mapping[str, str]
    post_norm: bool = False
    over_heads: tuple[str, ...] = ()
    entrance: str = ""
    modes: tuple[Mode, ...] = get_args(Mode)
    traced: Callable[[], nn.Module] | None = None


def causal(config: transformers.PreTrainedConfig) -> nn.Module:
    config.use_cache = False
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def bert() -> nn.Module:
    """No plan of its own: its pairs are found."""
    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=16,
        max_position_embeddings=2048,
    )
    return transformers.BertForMaskedLM._from_config(config, dtype=torch.bfloat16)


def gpt_neox(num_heads: int) -> Family:
    return Family(
        build=partial(
            causal,
            transformers.GPTNeoXConfig(
                vocab_size=512,
                hidden_size=HIDDEN,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=num_heads,
                hidden_dropout=0.1,
            ),
        ),
        layer="gpt_neox.layers.0",
        colwise=("attention.query_key_value", "mlp.dense_h_to_4h"),
        rowwise=("attention.dense", "mlp.dense_4h_to_h"),
        norms=("input_layernorm", "post_attention_layernorm"),
        regions={"attention": "", "mlp": ""},
    )


class Rows(nn.Module):
    """Layers between a table and a head."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(512, HIDDEN, dtype=HALF), nn.ModuleList(layers)
        self.head = nn.Linear(HIDDEN, 512, dtype=HALF)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Packed(nn.Module):
    """Attention to itself by the operations of `F.multi_head_attention_forward`, of torch 2.13.

    The numbers of heads are those that what it is given has.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.head_dim = HIDDEN // num_heads
        self.in_proj = nn.Linear(HIDDEN, 3 * HIDDEN, dtype=HALF)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, dtype=HALF)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 0)
        s, b, _ = x.shape
        packed = self.in_proj(x)
        packed = packed.unflatten(-1, (3, packed.shape[-1] // 3))
        packed = packed.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        n = packed.shape[-1] // self.head_dim
        by_head = (each.view(s, b * n, self.head_dim).transpose(0, 1) for each in packed.unbind(0))
        q, k, v = (each.view(b, n, s, self.head_dim) for each in by_head)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.permute(2, 0, 1, 3).contiguous().view(b * s, n * self.head_dim)
        return self.out_proj(y).view(s, b, HIDDEN).transpose(1, 0)


class PackedLayer(nn.Module):
    """`nn.TransformerEncoderLayer` with its norms first and without dropout."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(HIDDEN, dtype=HALF) for _ in range(2))
        self.self_attn = Packed(num_heads)
        up, down = nn.Linear(HIDDEN, 512, dtype=HALF), nn.Linear(512, HIDDEN, dtype=HALF)
        self.mlp = nn.Sequential(up, nn.ReLU(), down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm1(x))
        hidden: torch.Tensor = self.mlp(self.norm2(x))
        return x + hidden


def torch_layer(num_heads: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        HIDDEN, num_heads, 512, dropout=0.0, batch_first=True, norm_first=True, dtype=HALF
    )


FAMILIES: Final = MappingProxyType(
    {
        "torch-attention": Family(
            build=lambda: Rows(PackedLayer(16) for _ in range(2)),
            traced=lambda: Rows(torch_layer(16) for _ in range(2)),
            layer="layers.0",
            colwise=("self_attn.in_proj", "mlp.0"),
            rowwise=("self_attn.out_proj", "mlp.2"),
            norms=("norm1", "norm2"),
            regions={"self_attn": "", "mlp": ""},
            modes=("tp",),
        ),
        "llama": Family(
            build=partial(
                causal,
                transformers.LlamaConfig(
                    vocab_size=512,
                    hidden_size=HIDDEN,
                    intermediate_size=512,
                    num_hidden_layers=2,
                    num_attention_heads=16,
                    num_key_value_heads=8,
                ),
            ),
            layer="model.layers.0",
            colwise=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "mlp.gate_proj", "mlp.up_proj"),
            rowwise=("self_attn.o_proj", "mlp.down_proj"),
            norms=("input_layernorm", "post_attention_layernorm"),
            regions={"self_attn": "hidden_states", "mlp": ""},
        ),
        "gpt-neox": gpt_neox(num_heads=16),
        "bert": Family(
            build=bert,
            layer="bert.encoder.layer.0",
            colwise=("attention.self.query", "attention.self.key", "attention.self.value",
                     "intermediate.dense"),
            rowwise=("attention.output.dense", "output.dense"),
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
            regions={"attention.self": "", "intermediate": ""},
            post_norm=True,
        ),
        # Attention and MLP read one norm, which is gathered once.
        "cohere": Family(
            build=partial(
                causal,
                transformers.CohereConfig(
                    vocab_size=512,
                    hidden_size=HIDDEN,
                    intermediate_size=512,
                    num_hidden_layers=2,
                    num_attention_heads=32,
                    num_key_value_heads=16,
                ),
            ),
            layer="model.layers.0",
            colwise=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "mlp.gate_proj", "mlp.up_proj"),
            rowwise=("self_attn.o_proj", "mlp.down_proj"),
            norms=("input_layernorm",),
            regions={},
            entrance="input_layernorm",
        ),
        "gpt-neox-8-heads": gpt_neox(num_heads=8),
        "olmo2": Family(
            build=partial(
                causal,
                transformers.Olmo2Config(
                    vocab_size=512,
                    hidden_size=HIDDEN,
                    intermediate_size=512,
                    num_hidden_layers=2,
                    num_attention_heads=16,
                    num_key_value_heads=8,
                ),
            ),
            layer="model.layers.0",
            colwise=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "mlp.gate_proj", "mlp.up_proj"),
            rowwise=("self_attn.o_proj", "mlp.down_proj"),
            norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            regions={"self_attn": "hidden_states", "mlp": ""},
            post_norm=True,
            over_heads=("self_attn.q_norm", "self_attn.k_norm"),
        ),
        # A convolution over tokens in the place of attention.
        "lfm2": Family(
            build=partial(
                causal,
                transformers.Lfm2Config(
                    vocab_size=512,
                    hidden_size=HIDDEN,
                    block_ff_dim=512,
                    num_hidden_layers=2,
                    num_attention_heads=16,
                    num_key_value_heads=8,
                    full_attn_idxs=[1],
                ),
            ),
            layer="model.layers.0",
            colwise=("feed_forward.w1", "feed_forward.w3"),
            rowwise=("feed_forward.w2",),
            norms=(),
            regions={"feed_forward": ""},
            modes=("tp",),
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one layer on one of `num_ranks` ranks.

    `saved`: dtype and bytes of every storage kept for backward, parameters and the layer's other
    inputs (rotary tables) excepted. `transient_bytes`: the most alive in the backward pass beyond
    the saved ones, with gradients of parameters. `collectives`: phase -> operation -> bytes put in,
    one by one. `copied`: bytes that concatenations write. `moved`: phase -> operation -> bytes that
    all else reads and writes, but for products and attention.
    """

    family: str
    mode: Mode
    num_ranks: int
    forward_flop: int
    backward_flop: int
    saved: list[tuple[str, int]]
    transient_bytes: int
    num_params: int
    collectives: dict[str, dict[str, list[int]]]
    copied: dict[str, int]
    moved: dict[str, dict[str, int]]


class Local(Watch):
    """The operations on local tensors: torch's FLOPs, and the collectives, by phase.

    `copied`: bytes that concatenations wrote. And what is alive, but for storages in `known`.
    """

    def __init__(self, known: frozenset[int]) -> None:
        super().__init__([], known)
        self.phase = "forward"
        self.flop: Counter[str] = Counter()
        self.collectives: dict[str, dict[str, list[int]]] = {"forward": {}, "backward": {}}
        self.copied = {"forward": 0, "backward": 0}
        self.moved: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor runs it on the local tensors, which comes back here
        packet = func.overloadpacket
        if packet.__name__ == "wait_tensor":  # a fake one is a tensor of its own
            key = args[0].untyped_storage()._cdata
            self.refs = [row for row in self.refs if row[2] != key]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if packet in FLOP:
            self.flop[self.phase] += FLOP[packet](*args, **(kwargs or {}), out_val=out)
        if packet is torch.ops.aten.cat:
            self.copied[self.phase] += out.numel() * out.element_size()
        elif func.namespace in ("aten", "mist") and not (packet in FLOP or is_free(func, out)):
            self.moved[self.phase][str(packet)] += moved_bytes(args, kwargs, out)
        if "c10d" in func.namespace and packet.__name__ != "wait_tensor":
            sizes = self.collectives[self.phase].setdefault(packet.__name__, [])
            sizes.append(args[0].numel() * args[0].element_size())
        return out

    def backward(self, saved: Sequence[torch.Tensor]) -> None:
        """The backward pass begins, with these alive."""
        storages = [tensor.untyped_storage() for tensor in saved]
        self.refs = [(StorageWeakRef(each), each.nbytes(), each._cdata) for each in storages]
        self.phase, self.moments = "backward", []


def is_free(func: OpOverload, out: object) -> bool:
    """Whether a call moves nothing: a view, an allocation, the start, or a parameter's gradient."""
    node = torch._C._current_autograd_node()
    accumulates = node is not None and node.name() == "torch::autograd::AccumulateGrad"
    name = func.overloadpacket.__name__
    unread = "empty" in name or name in ("detach", "_unsafe_view", "zeros", "lift_fresh")
    tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out))
    return accumulates or func.is_view or unread or not tensors


def moved_bytes(*values: object) -> int:
    """Bytes of the tensors in a call's arguments and results, each of their places once."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return sum(size_of(each) for each in {id(each): each for each in tensors}.values())


def size_of(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size for size, step in steps if step)


@dataclass(slots=True)
class Saved:
    """The storages saved for backward, those in `known` excepted. Holds them, so none is reused."""

    known: frozenset[int]
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        local = local_of(tensor)
        key = local.untyped_storage()._cdata
        if key not in self.known:
            self.tensors.setdefault(key, local)
        return tensor

    def taken(self) -> list[torch.Tensor]:
        """All of them, which are held no longer."""
        held, self.tensors = list(self.tensors.values()), {}
        return held


def listed(kept: Sequence[torch.Tensor]) -> list[tuple[str, int]]:
    """Dtype and bytes of each storage."""
    return sorted((str(each.dtype), each.untyped_storage().nbytes()) for each in kept)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What a rank holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def measure(name: str, mode: Mode, num_ranks: int, batch: int, seq: int) -> Measured:
    """Divide the layer over the ranks and run it forward and backward."""
    family = FAMILIES[name]
    with _ranks(num_ranks) as mesh, FakeTensorMode():
        model = family.build()
        layer = model.train().get_submodule(family.layer)
        own_seq = seq // num_ranks if mode == "sp" else seq
        with runs_as(BF16):  # after transformers has imported what it patches
            ids = torch.zeros(batch, seq, dtype=torch.int64)
            args, kwargs = layer_inputs(model, layer, {"input_ids": ids})
            x = torch.empty(batch, own_seq, HIDDEN, dtype=torch.bfloat16)
            parallelize_module(layer, mesh, plan(family, mode), src_data_rank=None)
            if family.entrance:  # behind the norm's own style
                behind = PrepareModuleOutput(
                    output_layouts=Shard(SEQ_DIM) if mode == "sp" else Replicate(),
                    desired_output_layouts=Replicate(),
                    use_local_output=False,
                )
                parallelize_module(layer, mesh, {family.entrance: behind})
            # How layouts propagate is found on whole fake tensors, once a shape: not the rank's.
            _run(layer, (x, *args[1:]), kwargs)
            layer.zero_grad(set_to_none=True)
            local, saved = _run(layer, (x, *args[1:]), kwargs)
        return Measured(
            family=name,
            mode=mode,
            num_ranks=num_ranks,
            forward_flop=local.flop["forward"],
            backward_flop=local.flop["backward"],
            saved=saved,
            transient_bytes=local.peak(set()) - sum(size for _, size in saved),
            num_params=sum(local_of(p).numel() for p in layer.parameters()),
            collectives=local.collectives,
            copied=local.copied,
            moved={phase: dict(moved) for phase, moved in local.moved.items()},
        )


def _run(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Local, list[tuple[str, int]]]:
    """One pass each way: what ran on local tensors, and what was kept between the passes."""
    x = args[0].detach().requires_grad_()
    others = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, torch.Tensor)]
    states = [*layer.parameters(), *layer.buffers(), *others]
    known = frozenset(local_of(each).untyped_storage()._cdata for each in states)
    saved = Saved(known)
    with Local(known) as local:
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            out = layer(x, *args[1:], **kwargs)
        kept = saved.taken()
        rows = listed(kept)
        done, start = Start.apply(out), torch.empty((), dtype=out.dtype)
        local.backward(kept)
        del out, kept
        done.backward(start)
    return local, rows


def plan(family: Family, mode: Mode) -> dict[str, ParallelStyle]:
    """The layer's division in torch's terms; regions gather once, not once per matrix."""
    between = Shard(SEQ_DIM) if mode == "sp" else Replicate()
    styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in family.colwise}
    styles |= {name: RowwiseParallel(output_layouts=between) for name in family.rowwise}
    styles |= {name: _entrance(keyword, between) for name, keyword in family.regions.items()}
    styles |= {name: OverHeads() for name in family.over_heads}
    if mode == "sp":
        styles |= {
            name: SequenceParallel(use_local_output=family.post_norm) for name in family.norms
        }
    return styles


class OverHeads(ParallelStyle):
    """A norm whose rows are divided, as its weight is: DTensor makes means of means."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (DTensor.from_local(args[0], device_mesh, (Shard(-1),), run_check=False),)

        def leave(module: nn.Module, args: object, output: DTensor) -> torch.Tensor:
            return output.to_local()

        weight = module.get_parameter("weight")
        divided = distribute_tensor(weight, device_mesh, (Shard(0),), src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(divided))
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


def _entrance(keyword: str, between: Replicate | Shard) -> PrepareModuleInput:
    if keyword:
        return PrepareModuleInput(
            input_kwarg_layouts={keyword: between},
            desired_input_kwarg_layouts={keyword: Replicate()},
        )
    return PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))


@contextmanager
def _ranks(num_ranks: int) -> Iterator[DeviceMesh]:
    """Within: this process is rank 0 of a group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield init_device_mesh("cpu", (num_ranks,))
    finally:
        dist.destroy_process_group()


def main(batch: int, seq: int, families: Sequence[str]) -> None:
    cases = [(f, *case) for f in families for case in product(FAMILIES[f].modes, DEGREES)]
    print(json.dumps([asdict(measure(*case, batch, seq)) for case in cases]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
