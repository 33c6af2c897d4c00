"""A model in the parallel form that a plan says, with its optimizer.

Order: cut into chunks, on the meta device -> tensor parallelism -> memory levels and offload ->
FSDP2 -> memory on the device -> initial weights -> optimizer -> pipeline schedule.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import loss_parallel

from mist.errors import ModelError
from mist.exec.build.activations import Offloader, apply_memory_level
from mist.exec.build.adamw import AdamW, Settings, local, make_slots
from mist.exec.build.batch_shape import planned_shape
from mist.exec.build.batches import micro_batch, rank_rows, to_device
from mist.exec.build.device_meshes import RankPlace, new_groups, take_place
from mist.exec.build.flex_on_cpu import flex_on
from mist.exec.build.fsdp import (
    COMPUTE,
    ZeroSharding,
    begin_backward,
    gathered_for_all_calls,
    shard,
)
from mist.exec.build.gradient_flow import Flows, flows_of
from mist.exec.build.gradient_sync import Tied, add_partial, add_tied, clip_scale, global_norm
from mist.exec.build.host_copies import Swapper
from mist.exec.build.initial_weights import fill
from mist.exec.build.model_structure import ModelStructure, beginnings
from mist.exec.build.pipeline import PipelineSchedule, Shell
from mist.exec.build.process_group import warm_up
from mist.exec.build.rank_grid import chunk_layers
from mist.exec.build.stage_module import Chunk, cut
from mist.exec.build.step_clock import StepClock
from mist.exec.build.step_recorder import StepMeasurement, StepRecorder, allocated
from mist.exec.build.tensor_parallelism import ChunkPart, divide
from mist.exec.build.tensor_parts import SideBySide
from mist.exec.build.tensor_rules import TensorRules, tensor_rules
from mist.exec.build.torch_versions import refuse_missing
from mist.exec.build.weight_init import Whole, initial_values
from mist.layers import defer_logits
from mist.plans.plan import Plan, StagePlan
from mist.plans.workload import MemoryLevel
from mist.trace.models.loader import LoadedModel

Memory = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with its structure and rules: what `build` needs in addition to the plan.

    `values`: values of parameters that do not come from the seed, in memory or in files.
    """

    loaded: LoadedModel
    structure: ModelStructure
    rules: Mapping[int, TensorRules]
    values: Mapping[str, Whole] = field(default_factory=dict)


def subject_of(loaded: LoadedModel, structure: ModelStructure, plan: Plan) -> Subject:
    """Find the tensor-parallel rules that the plan needs. Raises ModelError."""
    degrees = {stage.tp for stage in plan.stages} - {1}
    seq_len = plan.workload.seq_len
    rules = {tp: tensor_rules(loaded, structure, seq_len, tp) for tp in sorted(degrees)}
    return Subject(loaded=loaded, structure=structure, rules=rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Mean loss of a step and norm of its gradient, the same on every rank."""

    loss: float
    norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One chunk of layers; `parameters` by the model's names, `partial` those to be summed."""

    root: Chunk
    layers: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]
    on_host: frozenset[str]
    partial: tuple[nn.Parameter, ...]
    flows: Flows
    offloader: Offloader | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What every chunk of this rank is built from."""

    subject: Subject
    plan: Plan
    place: RankPlace
    swapper: Swapper
    memory: Memory

    @property
    def stage(self) -> StagePlan:
        return self.plan.stages[self.place.stage]

    @property
    def scale(self) -> float:
        """What summed losses are multiplied by before the backward pass, to keep gradients small.

        What they are sums over is known only after it: gradients are divided by that at the end.
        """
        return 1.0 / self.plan.workload.tokens_per_step

    @property
    def split_loss(self) -> bool:
        """Whether logits stay divided: not when the user's own loss reads them."""
        rules = self.subject.rules.get(self.stage.tp)
        return rules is not None and rules.head is not None and self.subject.loaded.loss is None


def build(
    subject: Subject, plan: Plan, device: torch.device, settings: Settings, seed: int
) -> "Parallel":
    """This rank's part of the model; all ranks of the default process group call it together."""
    parallel = assemble(subject, plan, device, settings)
    initialise(parallel, subject, seed)
    return parallel


def assemble(
    subject: Subject,
    plan: Plan,
    device: torch.device,
    settings: Settings,
    memory: Memory = nullcontext,
) -> "Parallel":
    """This rank's part of the model, without values. `memory`: within which it is allocated.

    Raises ModelError for a plan that this version of torch cannot run, for stages that would have
    to pass on more than one activation, and for layers that the model does not have.
    """
    refuse_missing(plan)
    num_stages, reason = len(plan.stages), subject.structure.unstaged
    if num_stages > 1 and reason is not None:
        name = subject.loaded.name
        raise ModelError(
            f"pp {num_stages}: mist apply cannot divide {name} over stages: {reason}; use pp 1"
        )
    plan = _of_distinct_layers(plan, subject)
    place = take_place(plan, device)
    job = _Job(subject=subject, plan=plan, place=place, swapper=Swapper(device), memory=memory)
    pieces = chunk_layers(plan, place.stage)
    of_layers = job.stage.levels
    num_on_host = round(job.stage.offload.weights * job.stage.num_layers)
    built: dict[int, Built] = {}
    done = 0
    for index, layers in pieces:
        first_on_host = job.stage.num_layers - num_on_host - done
        built[index] = _chunk(job, layers, of_layers[done:], max(first_on_host, 0))
        done += len(layers)
    parallel = Parallel(job, built, settings)
    # In the order of all ranks; a first send amid the schedule would wait for ranks that compute.
    warm_up(parallel.groups(), device)
    return parallel


def _of_distinct_layers(plan: Plan, subject: Subject) -> Plan:
    """The plan of layers that are called again, with each of them once."""
    structure, name = subject.structure, subject.loaded.name
    if plan.num_layers != structure.num_calls:
        raise ModelError(
            f"the plan has {plan.num_layers} layers, but {name} calls {structure.num_calls}; "
            "plan again"
        )
    num_layers = len(structure.layers)
    if plan.num_layers == num_layers:
        return plan
    (stage,) = plan.stages
    levels = [level for level, count in stage.memory.items() if count]
    if len(levels) > 1:
        raise ModelError(
            f"checkpoint {' and '.join(levels)}: {name} calls layers again, which have one level "
            "for all their calls. Use one level."
        )
    alike = replace(stage, layers=((0, num_layers),), memory={levels[0]: num_layers})
    return replace(plan, stages=(alike,))


def initialise(parallel: "Parallel", subject: Subject, seed: int) -> None:
    """Fill this rank's shards with the weights that were given, or that the seed gives."""
    owners: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parallel.parameters.items():
        if name in subject.values:
            fill(parameter, subject.values[name], parallel.side_by_side.get(name))
            continue
        owner, _, attribute = name.rpartition(".")
        owners.setdefault(owner, {})[attribute] = parameter
    for owner, own_parameters in owners.items():
        device = parallel.place.device
        values = initial_values(subject.loaded.module, owner, seed, device)
        for name, parameter in own_parameters.items():
            fill(parameter, values[name], parallel.side_by_side.get(f"{owner}.{name}"))


def _chunk(job: _Job, layers: range, of_layers: Sequence[MemoryLevel], first_on_host: int) -> Built:
    """Build one chunk. `first_on_host`: its layers from here on keep their states on the host."""
    structure, stage, place = job.subject.structure, job.stage, job.place
    part = cut(job.subject.loaded, structure, layers, COMPUTE[job.plan.workload.precision])
    names = structure.layers[layers.start : layers.stop]
    ends = ChunkPart(
        layers=names,
        first=layers.start == 0,
        last=layers.stop == len(structure.layers),
        front=structure.front,
        tail=structure.tail,
        micro_batch=stage.micro_batch,
        sp=stage.sp,
        split_loss=job.split_loss,
    )
    # Tensor parallelism first: FSDP2 then divides the part that a rank has.
    partial_names: frozenset[str] = frozenset()
    if stage.tp > 1:
        rules = job.subject.rules[stage.tp]
        partial_names = divide(part.module, rules, ends, place.tp_mesh)
    modules = [part.module.get_submodule(name) for name in names]
    head = defer_logits(part.module, modules, stage.head) if ends.last else None
    root = Chunk(part, job.scale, head)
    # Before FSDP2, whose hooks run around a forward: when a checkpoint runs it again in the
    # backward pass, the layer is gathered.
    offloader = _apply_levels(job, modules, of_layers)
    host_layers = modules[first_on_host:]
    flows = flows_of(job.subject.loaded, structure, layers)
    level = ZeroSharding(
        zero=stage.zero,
        idle=flows.idle,
        precision=job.plan.workload.precision,
        on_host=frozenset(map(id, host_layers)),
    )
    # On the meta device: only shards ever get memory.
    shard(root, modules, place.dp_mesh, level)
    with job.memory():
        on_host = {id(p) for layer in host_layers for p in layer.parameters()}
        _give_memory(root, place.device, on_host)
    parameters = dict(part.module.named_parameters())
    return Built(
        root=root,
        layers=tuple(names),
        parameters={structure.tied.get(name, name): p for name, p in parameters.items()},
        on_host=frozenset(n for n in parameters if n.startswith(beginnings(names[first_on_host:]))),
        partial=tuple(parameters[name] for name in sorted(partial_names)),
        flows=flows,
        offloader=offloader,
    )


def _apply_levels(
    job: _Job, modules: Sequence[nn.Module], of_layers: Sequence[MemoryLevel]
) -> Offloader | None:
    ratio = job.stage.offload.activations
    offloader = Offloader(ratio, job.swapper) if ratio else None
    for module, level in zip(modules, of_layers, strict=False):
        apply_memory_level(module, level)
        if offloader is not None:
            offloader.attach(module)
    return offloader


def _give_memory(root: nn.Module, device: torch.device, on_host: set[int]) -> None:
    """Memory for parameters on the meta device, once for tied ones; buffers go along."""
    parameters: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                where = torch.device("cpu") if id(value) in on_host else device
                new = nn.Parameter(torch.empty_like(value, device=where), value.requires_grad)
                module._parameters[name] = parameters.setdefault(id(value), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _moved(buffer, device)


def _moved(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A buffer on the device; what stands for zeros stays the size of one number."""
    if buffer.numel() > 1 and not any(buffer.stride()):
        return buffer.flatten()[:1].to(device).view(()).expand(buffer.shape)
    return buffer.to(device)


class Parallel:
    """This rank's part of a model in training. `parameters`: its shards, by the model's names.

    `side_by_side`: those of them whose rows are not in the model's order
    (`mist.exec.build.tensor_parts`).
    """

    def __init__(self, job: _Job, chunks: Mapping[int, Built], settings: Settings) -> None:
        self.plan = job.plan
        self.place = job.place
        self.parameters = {n: p for c in chunks.values() for n, p in c.parameters.items()}
        self.side_by_side = dict(_side_by_side(job))
        self._chunks = chunks
        self.swapper = job.swapper
        self.clock = StepClock(job.place.device)
        self._split_loss = job.split_loss
        self._scale = job.scale
        self._batch_shape = planned_shape(job.subject.loaded, job.plan.workload)
        self._tied = tuple(_tied(job, self.parameters))
        self._on_host = frozenset[str]().union(*(chunk.on_host for chunk in chunks.values()))
        share = self.stage.offload.optimizer
        with job.memory():
            slots = list(make_slots(self.parameters, self._on_host, share, job.swapper))
        self.optimizer = AdamW(settings, job.swapper, slots)
        self._pipeline = self._make_pipeline(job) if len(self.plan.stages) > 1 else None

    @property
    def stage(self) -> StagePlan:
        """The stage of this rank."""
        return self.plan.stages[self.place.stage]

    def train_step(self, batch: object) -> StepResult:
        """One optimizer step on all samples of a step (each rank takes its own of them).

        Raises InputError for a batch of another shape than the plan's, alike on every rank.
        """
        loss, norm = self.unread_step(batch)
        return StepResult(loss=float(loss), norm=float(norm))

    def unread_step(self, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        """The same step; mean loss and norm stay on the device."""
        self.clock.start()
        modules = chain(*(each.root.modules() for each in self.chunks))
        with flex_on(self.place.device, modules), self._loss():
            self.gradients(batch)
        with self.clock.timing("sums"):
            self._add_up()
            loss, factor = self._mean()
            sums_norm = global_norm(self.parameters, self.stage.tp, self._tied, self.place.device)
            # Gradients are of sums over tokens: factor makes them those of the mean.
            norm = sums_norm * factor
        with self.clock.timing("optimizer"):
            self.optimizer.step(factor * clip_scale(norm, self.optimizer.settings.max_norm))
            self.optimizer.zero_grad()
        return loss, norm

    def _loss(self) -> AbstractContextManager[object]:
        return loss_parallel() if self._split_loss else nullcontext()

    def counted_step(self, batch: object) -> tuple[StepResult, StepMeasurement]:
        """A step of which every operation is counted: slower, and on CUDA not as it runs else."""
        recorder = StepRecorder(chain(*self.states(on_host=False).values()), self.axes)
        self.swapper.quietly = recorder.on_host
        with recorder:
            step = self.train_step(batch)
        self.swapper.quietly = nullcontext
        return step, recorder.measured()

    def measured_step(self, batch: object) -> tuple[StepResult, StepMeasurement]:
        """A step with its peak: on CUDA the allocator's own, of a step like any other."""
        if self.place.device.type != "cuda":
            return self.counted_step(batch)
        torch.cuda.reset_peak_memory_stats(self.place.device)
        step = self.train_step(batch)
        return step, allocated(torch.cuda.memory_stats(self.place.device))

    def states(self, *, on_host: bool) -> dict[str, list[torch.Tensor]]:
        """What the device, or the host, holds between steps: parameters, moments, buffers."""
        slots = self.optimizer.slots
        parameters = self.parameters.items()
        shards = [local(p.detach()) for n, p in parameters if (n in self._on_host) is on_host]
        moments = [m for s in slots if s.moments_on_host is on_host for m in (s.first, s.second)]
        buffers = [] if on_host else [b for c in self.chunks for b in c.root.buffers()]
        return {"parameters": shards, "optimizer": moments, "buffers": buffers}

    @property
    def chunks(self) -> tuple[Built, ...]:
        """The chunks of layers of this rank."""
        return tuple(self._chunks.values())

    def groups(self) -> Iterator[dist.ProcessGroup]:
        """Every group that this rank has collectives or transfers in, in the order of all ranks."""
        for mesh in (self.place.dp_mesh, self.place.tp_mesh):
            yield from mesh.get_all_groups()
        yield self.place.column
        yield from {id(each.group): each.group for each in self._tied}.values()

    @property
    def axes(self) -> dict[str, str]:
        """Names of process groups, and the axis that each stands for."""
        meshes = {"dp": self.place.dp_mesh, "tp": self.place.tp_mesh}
        return {
            str(group.group_name): axis
            for axis, mesh in meshes.items()
            for group in mesh.get_all_groups()
        }

    def gradients(self, batch: object) -> None:
        """Forward and backward of all micro-batches: gradients of summed losses (`_Job.scale`)."""
        self._batch_shape.check(batch)
        count, size = self.plan.num_micro_batches, self.stage.micro_batch
        rows = rank_rows(batch, self.place.grid, self.place.i, count)
        inputs = to_device(rows, self.place.device)
        for each in self.chunks:
            each.root.start(self.place.device)
        if self._pipeline is not None:
            self._pipeline.step(inputs)
            return
        chunk = self._chunks[0]
        for index in range(count):
            if chunk.offloader is not None:
                chunk.offloader.start()
            # FSDP2 reads these flags in the hooks of the coming backward pass.
            begin_backward(chunk.root, zero=self.stage.zero, last=index == count - 1)
            with self.clock.timing("forward"):
                loss = chunk.root(micro_batch(inputs, size, index, size * count))
            with self.clock.timing("backward"), gathered_for_all_calls(chunk.root):
                loss.backward()

    def _add_up(self) -> None:
        """Sum the gradients that several ranks hold a part of."""
        for chunk in self._chunks.values():
            if chunk.partial:
                add_partial(chunk.partial, self.place.tp_mesh)
        add_tied(self._tied)

    def _mean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of the step, and the factor that makes gradients those of the mean.

        Of what the ranks of the last stage have tallied; both are 0 where nothing was learned.
        """
        # Stages before the last have tallied nothing, and tensor-parallel ranks all the same.
        tally = torch.stack([chunk.root.tally for chunk in self.chunks]).sum(0) / self.stage.tp
        dist.all_reduce(tally)
        total, number = tally.unbind()
        share = torch.where(number == 0, 0.0, 1.0 / number)
        return total * share, share / self._scale

    def _make_pipeline(self, job: _Job) -> PipelineSchedule:
        structure, workload = job.subject.structure, self.plan.workload
        seq_len, *others = structure.boundary
        tokens = seq_len // self.stage.tp if self.stage.sp else seq_len
        activation = torch.empty(
            (self.stage.micro_batch, tokens, *others),
            dtype=COMPUTE[workload.precision],
            device="meta",
        ).requires_grad_()
        shells = {
            index: Shell(chunk.root, chunk.offloader, self.clock, chunk.flows)
            for index, chunk in self._chunks.items()
        }
        return PipelineSchedule(shells, self.place, self.plan, activation)


def _side_by_side(job: _Job) -> Iterator[tuple[str, SideBySide]]:
    """Parameters of several matrices side by side, of each of which a rank has a part."""
    rules = job.subject.rules.get(job.stage.tp)
    for name, parts in (rules.parts if rules is not None else {}).items():
        for attribute, rule in parts.items():
            if rule.dim is not None and len(rule.widths) > 1:
                yield (
                    f"{name}.{attribute}",
                    SideBySide(widths=rule.widths, dim=rule.dim, num_ranks=job.stage.tp),
                )


def _tied(job: _Job, parameters: Mapping[str, nn.Parameter]) -> Iterator[Tied]:
    """Parameters that the first and the last stage both hold."""
    structure, grids, stages = job.subject.structure, job.place.grids, job.plan.stages
    shared = sorted(structure.front & structure.tail)
    if len(stages) == 1 or not shared:
        return
    first, last = grids[0], grids[-1]
    # Stages in between create the groups, too: new_group is collective.
    pairs = [[first.rank(*at), last.rank(*at)] for at in first.places()]
    group = new_groups(pairs).get(job.place.rank)
    if group is not None:
        yield from (Tied(parameter=parameters[name], group=group) for name in shared)
