"""AdamW over the shards of a rank, with any part of its state in host memory.

The update is torch's own functional AdamW on local shards (fused: no temporary copies). What
lives on the host (moments by ratio; shards and gradients of offloaded layers) is streamed through
the device bucket by bucket: while one is updated the next one is on its way in and the last one on
its way out. A large shard goes in pieces, by rows: the update looks at each number by itself.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from mist.exec.build.host_copies import Copy, Swapper, wait_for_all

BUCKET_BYTES: Final = 64 * 2**20  # what is on its way at once, per state


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of AdamW; `max_norm` is of the gradient of the whole model (None: no clipping)."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class ParameterState:
    """One parameter's shard with its moments, and which of them live in host memory."""

    name: str
    parameter: torch.nn.Parameter
    first: torch.Tensor
    second: torch.Tensor
    parameter_on_host: bool
    moments_on_host: bool

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Shards of value and gradient, and the moments."""
        assert self.parameter.grad is not None, self.name
        return local(self.parameter.detach()), local(self.parameter.grad), self.first, self.second

    @property
    def on_host(self) -> tuple[bool, ...]:
        """Which of the tensors are on the host."""
        return (self.parameter_on_host,) * 2 + (self.moments_on_host,) * 2

    def pieces(self) -> "Iterator[_ShardRows]":
        """Its tensors by rows, of BUCKET_BYTES at most but for a single row that is larger."""
        tensors = [torch.atleast_1d(tensor) for tensor in self.tensors]
        num_rows, row_bytes = len(tensors[2]), tensors[2][:1].nbytes
        step = max(BUCKET_BYTES // max(row_bytes, 1), 1)
        for first in range(0, num_rows, step):
            rows = tuple(tensor[first : first + step] for tensor in tensors)
            yield _ShardRows(tensors=rows, on_host=self.on_host)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ShardRows:
    """Rows of a parameter's shards, as `ParameterState.tensors`, and which live on the host."""

    tensors: tuple[torch.Tensor, ...]
    on_host: tuple[bool, ...]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class AdamW:
    """The optimizer of one rank. Raises nothing; parameters without a gradient stay as they are.

    `slots`: of the parameters that are trained.
    """

    def __init__(
        self, settings: Settings, swapper: Swapper, slots: Sequence[ParameterState]
    ) -> None:
        self.settings = settings
        self.num_steps = 0
        self.slots = tuple(slots)
        self._swapper = swapper

    def step(self, scale: torch.Tensor) -> None:
        """Update every parameter; gradients are multiplied by `scale` first."""
        self.num_steps += 1
        # A parameter that the loss does not depend on has no gradient.
        ready = [slot for slot in self.slots if slot.parameter.grad is not None]
        if on_device := [slot.tensors for slot in ready if not any(slot.on_host)]:
            self._update(on_device, scale)
        streamed = (piece for slot in ready if any(slot.on_host) for piece in slot.pieces())
        self._stream(list(_buckets(streamed)), scale)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for slot in self.slots:
            slot.parameter.grad = None

    def _stream(self, buckets: Sequence[Sequence[_ShardRows]], scale: torch.Tensor) -> None:
        incoming = self._fetch(buckets[0]) if buckets else []
        outgoing: list[Copy] = []
        leaving: list[Copy] = []
        for index, bucket in enumerate(buckets):
            tensors = [tuple(copy.wait() for copy in copies) for copies in incoming]
            wait_for_all(leaving)  # the bucket before is gone: three are never here at once
            incoming = self._fetch(buckets[index + 1]) if index + 1 < len(buckets) else []
            self._update(tensors, scale)
            leaving = list(self._put_back(bucket, tensors))
            outgoing += leaving
        # The host reads without streams (a checkpoint): it must not see a copy in flight.
        for copy in outgoing:
            copy.arrived()

    def _fetch(self, bucket: Sequence[_ShardRows]) -> list[tuple[Copy, ...]]:
        return [
            tuple(
                self._swapper.to_device(copy) if on_host else copy
                for copy, on_host in zip(
                    (Copy(tensor=t) for t in piece.tensors), piece.on_host, strict=True
                )
            )
            for piece in bucket
        ]

    def _put_back(
        self, bucket: Sequence[_ShardRows], updates: Sequence[tuple[torch.Tensor, ...]]
    ) -> Iterator[Copy]:
        """Copies to the host of what was changed; a gradient is not needed any more."""
        for piece, tensors in zip(bucket, updates, strict=True):
            for index in (0, 2, 3):
                if piece.on_host[index]:
                    yield self._swapper.to_host(tensors[index], piece.tensors[index])

    def _update(self, tensors: Sequence[tuple[torch.Tensor, ...]], scale: torch.Tensor) -> None:
        values, grads, first, second = (list(column) for column in zip(*tensors, strict=True))
        # Clipping and the division by the number of tokens in one pass over the gradients.
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
        device = self._swapper.device
        # The functional form counts the step up before it uses it, and wants a tensor of its own
        # for each parameter.
        steps = torch.full((len(values),), float(self.num_steps - 1), device=device)
        beta1, beta2 = self.settings.betas
        adamw(
            values,
            grads,
            first,
            second,
            [],
            list(steps.unbind()),
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            eps=self.settings.eps,
            maximize=False,
        )


def make_slots(
    parameters: Mapping[str, torch.nn.Parameter],
    on_host: frozenset[str],
    host_ratio: float,
    swapper: Swapper,
) -> Iterator[ParameterState]:
    """A slot for each parameter that is trained, moments zero.

    `on_host`: parameters that live there. `host_ratio`: share of the bytes of all moments that do,
    parameter by parameter, each whole.
    """
    trained = {name: each for name, each in parameters.items() if each.requires_grad}
    shards = {name: local(parameter.detach()) for name, parameter in trained.items()}
    sizes = {name: shard.numel() * shard.element_size() for name, shard in shards.items()}
    offloaded = chosen(sizes, host_ratio)
    for name, parameter in trained.items():
        moments_on_host = name in offloaded
        first, second = (_zeros(shards[name], swapper, on_host=moments_on_host) for _ in range(2))
        yield ParameterState(
            name=name,
            parameter=parameter,
            first=first,
            second=second,
            parameter_on_host=name in on_host,
            moments_on_host=moments_on_host,
        )


def chosen(sizes: Mapping[str, int], ratio: float) -> frozenset[str]:
    """Names whose sizes make up this share of the whole, or less by no more than one that is left.

    The largest that fit, one after the other: a head that is as large as many layers finds room.
    """
    room = round(ratio * sum(sizes.values()))
    names = set()
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        if 0 < sizes[name] <= room:
            names.add(name)
            room -= sizes[name]
    return frozenset(names)


def _zeros(shard: torch.Tensor, swapper: Swapper, *, on_host: bool) -> torch.Tensor:
    if on_host:
        return swapper.zeros_on_host(shard)
    return torch.zeros_like(shard, device=swapper.device)


def _buckets(pieces: Iterable[_ShardRows]) -> Iterator[list[_ShardRows]]:
    """Pieces in groups, of BUCKET_BYTES of each state at most."""
    bucket: list[_ShardRows] = []
    total = 0
    for piece in pieces:
        size = piece.tensors[2].nbytes
        if bucket and total + size > BUCKET_BYTES:
            yield bucket
            bucket, total = [], 0
        bucket.append(piece)
        total += size
    if bucket:
        yield bucket
