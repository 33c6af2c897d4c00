"""Pipeline schedules: torch's own, over stages whose neighbours may have other ranks.

torch.distributed.pipelining gives the schedules. Its stage sends to one peer of an equal stage and
reduces gradients once per step; this one sends to whichever ranks need a part (`grid.transfers`),
and reduces when the ZeRO level says so.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mist.exec.build.activations import Offloader
from mist.exec.build.device_meshes import RankPlace
from mist.exec.build.fsdp import begin_backward, groups
from mist.exec.build.gradient_flow import Flows
from mist.exec.build.rank_grid import RankGrid, Span, transfers
from mist.exec.build.step_clock import StepClock
from mist.exec.build.torch_versions import known_by_older_names, param_groups
from mist.exec.build.without_view import without_view
from mist.plans.plan import Plan
from mist.plans.schedules import SCHEDULES
from mist.plans.workload import ScheduleKind

SINGLE: Final = {
    ScheduleKind.GPIPE: ScheduleGPipe,
    ScheduleKind.ONE_F_ONE_B: Schedule1F1B,
}
SEVERAL: Final = {
    ScheduleKind.INTERLEAVED: ScheduleInterleaved1F1B,
    ScheduleKind.ZERO_BUBBLE: ScheduleInterleavedZeroBubble,
}


class Shell(nn.Module):
    """Hides FSDP2 from torch's schedules, which would gather whole stages; names its batch."""

    def __init__(
        self, root: nn.Module, offloader: Offloader | None, clock: StepClock, flows: Flows
    ) -> None:
        super().__init__()
        self.flows = flows
        self.root = root
        self.clock = clock
        self.offloader = offloader
        self.layout: TreeSpec | None = None

    def forward(self, *received: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        """The chunk on one micro-batch, whose leaves come by name."""
        assert self.layout is not None
        if self.offloader is not None:
            self.offloader.start()
        values = [leaves[f"leaf{i}"] for i in range(len(leaves))]
        with self.clock.timing("forward"):
            output: torch.Tensor = self.root(tree_unflatten(values, self.layout), *received)
        # torch's split backward pass detaches an output in place.
        return without_view(output)


@dataclass(slots=True, kw_only=True)
class _Piece:
    """A part of a tensor that is being received."""

    buffer: torch.Tensor
    rows: slice
    columns: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """A tensor that is being received, and those of its parts that arrive apart."""

    buffer: torch.Tensor
    pieces: tuple[_Piece, ...]

    def assembled(self) -> torch.Tensor:
        """The tensor, when all has arrived."""
        for piece in self.pieces:
            self.buffer[piece.rows, piece.columns] = piece.buffer
        return self.buffer


@dataclass(slots=True, kw_only=True)
class _Arriving:
    """What is being received for each micro-batch, of activations and of gradients."""

    forward: dict[int, _Whole] = field(default_factory=dict)
    backward: dict[int, _Whole] = field(default_factory=dict)


@known_by_older_names
class Stage(PipelineStage):
    """One chunk of layers of a rank. `index` counts chunks along the pipeline."""

    def __init__(
        self, shell: Shell, index: int, place: RankPlace, plan: Plan, activation: torch.Tensor
    ) -> None:
        num_chunks = len(plan.stages) * plan.schedule.vpp
        # With example inputs and outputs torch's stage runs no step to find out shapes.
        ids = torch.empty(0, device=place.device)
        super().__init__(
            shell,
            index,
            num_chunks,
            place.device,
            input_args=activation if index else ids,
            output_args=activation,
            group=place.column,
        )
        self._place = place
        self._root = shell.root
        self._clock = shell.clock
        self._flows = shell.flows
        self._zero = plan.stages[place.stage].zero
        self._split = SCHEDULES[plan.schedule.kind].splits_backward
        self._sends_itself = plan.schedule.kind is not ScheduleKind.ONE_F_ONE_B
        self._leaving: dict[int, list[dist.Work]] = {}
        self._like = activation
        self._arriving = _Arriving()
        if place.column.size() == 1:
            # A group of one rank: the table that torch makes of its size would name ranks that are
            # not in it.
            self.stage_index_to_group_rank = dict.fromkeys(range(num_chunks), 0)

    # Shapes are known from the plan, so nothing is negotiated along the pipeline.

    def _warmup_forward_vote(
        self, has_backward: bool, received_acc: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.tensor([1], dtype=torch.int32)

    def _warmup_backward_result(self, received_result: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tensor([1], dtype=torch.int32)

    # Torch's stage allocates what it receives for all micro-batches of a step before the first one;
    # this one when a transfer begins.

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        self.args_recv_info = dict.fromkeys(range(num_microbatches), ())

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        self.chunks = num_microbatches

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the parts of an activation."""
        return [] if self.is_first else self._receive(self._arriving.forward, fwd_chunk_id, -1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the parts of a gradient."""
        none = self.is_last or not (self.has_backward and self._flows.behind)
        return [] if none else self._receive(self._arriving.backward, bwd_chunk_id, 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send an activation to all that need a part of it."""
        if self.is_last:
            return []
        output = self.fwd_cache[fwd_chunk_id][0][0]
        return self._leave(1, self._send(output.detach(), self._grid_at(1)))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a gradient to all that need a part of it."""
        if self.is_first or not self.has_backward:
            return []
        gradient = self.bwd_cache.pop(bwd_chunk_id)[0]
        if not self._flows.before:
            return []
        assert gradient is not None
        return self._leave(-1, self._send(gradient, self._grid_at(-1)))

    # Of torch's schedules only 1F1B drops what has been sent before the end of the step. Transfers
    # between two ranks have one order on both, so waiting for the one before stops no rank.

    def _leave(self, step: int, operations: Iterator[dist.P2POp]) -> list[dist.P2POp]:
        """The sends that the schedule issues: none, where it would keep tensors to the end."""
        if not self._sends_itself:
            return list(operations)
        self.sent(step)
        self._leaving[step] = schedules._batch_p2p(list(operations))
        return []

    def sent(self, *steps: int) -> None:
        """Wait for what was sent last to the chunk before (-1) or behind (1)."""
        for step in steps:
            for work in self._leaving.pop(step, ()):
                work.wait()

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        received = self._arriving.forward.pop(fwd_chunk_id).assembled()
        return (received.requires_grad_(self._flows.before),)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor | None, ...]:
        arriving = self._arriving.backward.pop(bwd_chunk_id, None)
        return (None if arriving is None else arriving.assembled(),)

    def _grid_at(self, step: int) -> RankGrid:
        """The grid of the chunk before or behind this one."""
        return self._place.grids[(self.stage_index + step) % len(self._place.grids)]

    def _receive(self, into: dict[int, _Whole], chunk_id: int, step: int) -> list[dist.P2POp]:
        """Begin to receive a micro-batch from the chunk before (-1) or behind (1)."""
        place, source = self._place, self._grid_at(step)
        span = place.grid.holds(place.i, place.j)
        buffer = torch.empty_like(self._like, device=place.device, requires_grad=False)
        pieces, operations = [], []
        # Sender and receiver walk the same list, so the n-th send of a pair of ranks meets its n-th
        # receive.
        for each in transfers(source, place.grid):
            if each.target == place.rank:
                rows, columns = _within(span, each.span)
                part = buffer[rows, columns]
                if not part.is_contiguous():
                    # Transfers need contiguous memory: such a part is copied into its place when
                    # all have arrived.
                    part = torch.empty_like(part, memory_format=torch.contiguous_format)
                    pieces.append(_Piece(buffer=part, rows=rows, columns=columns))
                operations.append(dist.P2POp(dist.irecv, part, each.source))
        into[chunk_id] = _Whole(buffer=buffer, pieces=tuple(pieces))
        return operations

    def _send(self, tensor: torch.Tensor, target: RankGrid) -> Iterator[dist.P2POp]:
        place = self._place
        span = place.grid.holds(place.i, place.j)
        for each in transfers(place.grid, target):
            if each.source == place.rank:
                rows, columns = _within(span, each.span)
                yield dist.P2POp(dist.isend, tensor[rows, columns].contiguous(), each.target)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]] | None]:
        """The backward pass of one micro-batch, with gradients reduced as the level says.

        A stage whose input needs no gradient runs all of it where others run the input's part.
        """
        root = self._root
        assert isinstance(root, FSDPModule)
        none = (None,) * len(bwd_kwargs.get("input_values", ())), None
        # FSDP2's hooks reduce behind the gradients of inputs. In a split backward pass those of
        # parameters come later, so all are reduced at the end of the step.
        last = last_backward and not self._split
        begin_backward(root, zero=0 if self._split else self._zero, last=last)
        if not self._flows.behind:
            self.without_backward(last=last)
            return none
        if not self._flows.before and backward_type == "weight":
            return none
        if not self._flows.before and backward_type == "input":
            backward_type, (output,) = "full", bwd_kwargs["stage_output"]
            bwd_kwargs = {**bwd_kwargs, "stage_output": output}
            if bwd_kwargs["output_grads"] is not None:
                (bwd_kwargs["output_grads"],) = bwd_kwargs["output_grads"]
        with self._clock.timing("backward"):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def without_backward(self, *, last: bool) -> None:
        """What stands for a backward pass where nothing so far is trained."""
        assert isinstance(self._root, FSDPModule)
        if last:
            end_of_step(self._root)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """The end of a step: what was not reduced with the last micro-batch."""
        if self._split:
            with self._clock.timing("backward"):
                reduce_gradients(self._root)


def reduce_gradients(root: nn.Module) -> None:
    """Reduce gradients of FSDP2 groups outside a backward pass, as torch's stage does."""
    assert isinstance(root, FSDPModule)
    root.set_is_last_backward(True)
    root.set_reshard_after_backward(True)
    root.set_requires_gradient_sync(True)
    for module in groups(root):
        for group in param_groups(module):
            group.post_backward()
    end_of_step(root)


def end_of_step(root: FSDPModule) -> None:
    """What FSDP2 does behind the last backward pass: gathered parameters are dropped."""
    root._get_fsdp_state()._root_post_backward_final_callback()


def _within(whole: Span, part: Span) -> tuple[slice, slice]:
    """Rows and columns of a part, counted within the span of a rank."""
    return (
        slice(part.first - whole.first, part.last - whole.first),
        slice(part.left - whole.left, part.right - whole.left),
    )


class PipelineSchedule:
    """Runs one step of a plan with several stages on this rank."""

    def __init__(
        self, shells: Mapping[int, Shell], place: RankPlace, plan: Plan, activation: torch.Tensor
    ) -> None:
        self._shells = tuple(shells.values())
        stages: list[Any] = [
            Stage(shell, index, place, plan, activation) for index, shell in shells.items()
        ]
        self._stages: tuple[Stage, ...] = tuple(stages)
        self._last = any(stage.is_last for stage in stages)
        # Losses are divided by the tokens of the step already, not by micro-batches.
        options: dict[str, Any] = {"loss_fn": _loss_of_output, "scale_grads": False}
        kind, count = plan.schedule.kind, plan.num_micro_batches
        self._schedule: Any = (
            SINGLE[kind](stages[0], count, **options)
            if kind in SINGLE
            else SEVERAL[kind](stages, count, **options)
        )
        self._first = any(stage.is_first for stage in stages)

    def step(self, batch: object) -> None:
        """Forward and backward of all micro-batches."""
        leaves, layout = tree_flatten(batch)
        for shell in self._shells:
            shell.layout = layout
        # Torch's schedules call the loss only where they get a target.
        target = {"target": leaves[0]} if self._last else {}
        inputs = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
        self._schedule.step(**target, **inputs, return_outputs=False)
        for stage in self._stages:
            stage.sent(-1, 1)


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _loss_of_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last chunk gives its loss itself."""
    return output
