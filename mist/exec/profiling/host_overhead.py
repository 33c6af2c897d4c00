"""What the host does for a layer apart from its operations: hooks of FSDP2, dispatch of DTensors.

A transformer so small that it computes next to nothing is trained as plans say, with few and with
many layers and micro-batches. What a layer more adds to a micro-batch, less what it adds to that of
a plain model, is the work of the host.
"""

from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Final, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mist.exec.build.adamw import Settings
from mist.exec.build.empty_weights import deferred, empty_parameters
from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import build, subject_of
from mist.exec.profiling.clock import Call, Clock, Seconds
from mist.exec.profiling.tiny_plan import SAMPLES, SEQ_LEN, tiny_plan
from mist.plans.plan import Plan
from mist.trace.models.loader import LoadedModel

DIM, NUM_HEADS, VOCAB_SIZE = 32, 4, 64
FEW, MANY = 2, 6  # layers
ONE, MORE = 1, 5  # micro-batches
COLLECTIVES_PER_LAYER: Final = 8  # two to enter and two to leave, forward and backward


class TinyAttention(nn.Module):
    """Causal attention. x [B, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        batch, seq, _ = x_BSD.shape
        q, k, v = (
            each(x_BSD).view(batch, seq, -1, DIM // NUM_HEADS).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        out_BHSK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: torch.Tensor = self.o(out_BHSK.transpose(1, 2).reshape(batch, seq, -1))
        return output


class Layer(nn.Module):
    """A layer of the Llama kind: gated, with two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attn = TinyAttention()
        self.gate, self.up, self.down = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD))
        y_BSD = self.mlp_norm(x_BSD)
        out: torch.Tensor = x_BSD + self.down(F.silu(self.gate(y_BSD)) * self.up(y_BSD))
        return out


class Tiny(nn.Module):
    """Token ids [B, S] to logits [B, S, V]."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB_SIZE, bias=False)

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x_BSD = self.embed(ids_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        logits: torch.Tensor = self.head(self.norm(x_BSD))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Seconds of a micro-batch: `ends_s` once, `layer_s` for every layer."""

    ends_s: float
    layer_s: float


def read_layers(clock: Clock) -> None:
    """What FSDP2 and tensor parallelism add to a layer and to a micro-batch, in s.

    Forward and backward together, without the collectives of a layer.
    """
    plain, data = _plain(clock), _micro_batch(clock, "dp")
    clock.note("host layer", {}, max(data.layer_s - plain.layer_s, 0.0))
    clock.note("host micro-batch", {}, max(data.ends_s - plain.ends_s, 0.0))
    if dist.get_world_size() > 1:
        added_s = _micro_batch(clock, "tp").layer_s - data.layer_s
        clock.note("host tensor layer", {}, max(added_s - _collectives_s(clock), 0.0))


def _plain(clock: Clock) -> _Line:
    """One micro-batch of the model by itself."""
    calls, sizes = [], []
    for num_layers in (FEW, MANY):
        model = Tiny(num_layers).to(clock.device)
        ids_BS = torch.zeros((SAMPLES, SEQ_LEN), dtype=torch.int64, device=clock.device)
        calls.append(partial(_forward_and_back, model, ids_BS))
        sizes.append({"layers": num_layers})
    few, many = clock.read_in_turn("tiny plain", sizes, calls)
    return _line(few, many)


def _forward_and_back(model: nn.Module, ids_BS: torch.Tensor) -> None:
    F.cross_entropy(model(ids_BS).flatten(0, 1), ids_BS.flatten()).backward()


def _micro_batch(clock: Clock, axis: Literal["dp", "tp"]) -> _Line:
    """One micro-batch amid others, of a step of ZeRO-1: what it adds to a step of fewer."""
    plans = [tiny_plan(layers, count, axis) for layers in (FEW, MANY) for count in (ONE, MORE)]
    sizes = [{"layers": p.num_layers, "micro_batches": p.num_micro_batches} for p in plans]
    steps = [_step(clock, plan) for plan in plans]
    few_one, few_more, many_one, many_more = clock.read_in_turn(f"tiny {axis}", sizes, steps)
    return _line((few_more - few_one) / (MORE - ONE), (many_more - many_one) / (MORE - ONE))


def _line(few: Seconds, many: Seconds) -> _Line:
    """Through the seconds of a micro-batch with few and with many layers, of all rounds.

    A disturbance slows down everything that is timed in the same round, so the difference is taken
    within each round.
    """
    layer_s = float(np.median(many - few)) / (MANY - FEW)
    return _Line(layer_s=layer_s, ends_s=float(np.median(few)) - FEW * layer_s)


def _collectives_s(clock: Clock) -> float:
    """Seconds of the collectives of one layer of the tiny model, by themselves."""
    whole = torch.zeros(SAMPLES, SEQ_LEN, DIM, device=clock.device)
    part = whole.chunk(dist.get_world_size(), dim=1)[0].contiguous()
    to_enter = partial(dist.all_gather_into_tensor, whole.flatten(), part.flatten())
    to_leave = partial(dist.reduce_scatter_tensor, part.flatten(), whole.flatten())
    sizes = {"bytes": float(whole.nbytes)}
    both = (clock.read(f"tiny {call.func.__name__}", sizes, call) for call in (to_enter, to_leave))
    return COLLECTIVES_PER_LAYER * fmean(both)


def _step(clock: Clock, plan: Plan) -> Call:
    """A step as the plan says."""
    with deferred():
        model = Tiny(plan.num_layers)
    empty_parameters(model)
    loaded = LoadedModel(module=model, name="tiny", make_batch=None, loss=None)
    subject = subject_of(loaded, examine(loaded, SEQ_LEN), plan)
    parallel = build(subject, plan, clock.device, Settings(), 7)
    ids_BS = torch.zeros((plan.workload.global_batch, SEQ_LEN), dtype=torch.int64)
    return partial(parallel.train_step, ids_BS)
