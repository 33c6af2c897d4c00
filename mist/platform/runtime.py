"""A runtime: what a training framework keeps in memory, moves, launches and overlaps.

Mirrors `profiles/runtimes/*.yaml`. Bytes per parameter are over the parameters that a rank holds
after tensor and pipeline parallelism.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Final, Literal

from mist.errors import PlatformError
from mist.plans.memory_levels import levels_that
from mist.plans.provenance import Kind
from mist.plans.workload import MemoryLevel, Optimizer, Precision, ScheduleKind
from mist.platform.quantity import Quantity, Record
from mist.platform.states import (
    StateItem,
    States,
    ZeroLevel,
    check_states,
    optimizers_of,
    states_of,
    sum_states,
)

LAUNCHED_AHEAD: Final = Quantity(
    value=1.0, source="kernels of a GPU run while the host launches the next ones", kind=Kind.SPEC
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transients(Record):
    """Copies that live for a layer (an FSDP group) at a time.

    `num_gathered_groups`: groups whose parameters are unsharded at once under ZeRO-3.
    `reduce_bytes_per_param`: gradients of the group being reduced, by compute precision.
    `root_group`: FSDP: embedding and head are one group, gathered for a whole micro-batch, and the
    buffer of a reduction lives until the next one. `gradient_pool`, `gather_pool`: reduced
    gradients, and what groups are gathered into, are allocated on streams of their own, whose
    memory serves nothing else (with `root_group`). `divided_loss_bytes_per_logit`: what the model's
    own loss holds more where tensor parallelism divides the logits. `token_copies`: activations are
    [samples, tokens, hidden] and collectives act on the first dimension, so that gathering tokens
    of several samples, and scattering them, goes through a whole copy, which takes time as well.
    `lone_copies_bytes_per_param`: what the reduction of a group makes on a rank that divides no
    gradients; null where that is not more than on others. `optimizer_bytes_per_param`:
    what a step of the optimizer makes and drops again, per parameter of a rank's shard, when no
    activation is left; under ZeRO-3 of `optimizer_group_params` parameters at a time (null: of all
    at once, as below ZeRO-3).
    """

    num_gathered_groups: Quantity
    reduce_bytes_per_param: Mapping[Precision, Quantity]
    optimizer_bytes_per_param: Quantity
    optimizer_group_params: Quantity | None = None
    root_group: bool = False
    gradient_pool: bool = False
    gather_pool: bool = False
    divided_loss_bytes_per_logit: Quantity | None = None
    token_copies: bool = False
    lone_copies_bytes_per_param: Quantity | None = None

    def __post_init__(self) -> None:
        if (self.gradient_pool or self.gather_pool) and not self.root_group:
            raise ValueError("gradient_pool and gather_pool are of runtimes with root_group")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTraffic(Record):
    """HBM traffic of gradients, parameters and optimizer, in addition to the layers' own.

    The copies out of an all-gather's and into a reduce-scatter's flat buffer are per parameter of
    the group, by compute precision. Accumulation is per parameter held and micro-batch. A step of
    the optimizer moves the bytes of `optimizer_sharded` per parameter of the rank's shard, and of
    `optimizer_replicated` per parameter held below ZeRO-3. `reduced_bytes_per_param`: of a gradient
    as ranks send it to each other to be summed (null: 4, fp32).
    """

    accumulation_bytes_per_param: Quantity
    gather_copy_bytes_per_param: Mapping[Precision, Quantity]
    scatter_copy_bytes_per_param: Mapping[Precision, Quantity]
    optimizer_sharded_bytes_per_param: Quantity
    optimizer_replicated_bytes_per_param: Quantity
    reduced_bytes_per_param: Quantity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLaunch(Record):
    """Time in which the host can launch a layer: no layer and micro-batch is faster.

    That is so where the host goes on while the device computes. `launch_ahead_ratio` is the share
    of the device's time in which it does: at 0 (the host is the device) launches come on top.

    `layer_launch_s` is forward plus backward; `forward_ratio` of it is the forward's.
    `tensor_parallel_launch_s` comes on top when t > 1, and where the pipeline spans nodes
    `pipeline_launch_s` * t^`pipeline_launch_exponent` more. With full checkpointing the forward's
    share is paid twice. Once a micro-batch and stage: `micro_batch_launch_s`; once a step: `step_s`
    (logging, the training loop).
    """

    exponents: ClassVar = ("pipeline_launch_exponent",)
    layer_launch_s: Quantity
    tensor_parallel_launch_s: Quantity
    pipeline_launch_s: Quantity
    pipeline_launch_exponent: Quantity
    forward_ratio: Quantity
    micro_batch_launch_s: Quantity
    step_s: Quantity
    launch_ahead_ratio: Quantity = LAUNCHED_AHEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap(Record):
    """How much of the collectives overlaps with compute, and how much that slows compute down.

    compute under communication takes (1 + `compute_slowdown_ratio`) times as long for the time
    that both run. Of each collective the ratio here (0 to 1) can overlap with compute, the rest
    is exposed; `gradient_all_reduce` concerns the last micro-batch. Tensor-parallel collectives
    add `tensor_parallel_time_scale` times their law: less than 1 where a part is hidden, more where
    ranks wait for each other. `layers_per_collective`: layers whose
    parameters or gradients one data-parallel collective carries. `chunk_transfer_ratio`: share of
    the transfers that chunks beyond a stage's first add which stands alone.
    """

    not_zero: ClassVar = ("tensor_parallel_time_scale", "layers_per_collective")
    compute_slowdown_ratio: Quantity
    zero_all_gather_ratio: Quantity
    zero_reduce_scatter_ratio: Quantity
    gradient_all_reduce_ratio: Quantity
    tensor_parallel_time_scale: Quantity
    layers_per_collective: Quantity
    chunk_transfer_ratio: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicy(Record):
    """From live bytes to what must fit.

    reserved = allocated * (1 + `allocator_overhead_ratio`); a plan leaves at least `margin_ratio`
    of the usable bytes free, and more where its peak is not sure (`Platform.margin_ratio`). The
    framework's own buffers hold `fixed_bytes`, and `buffer_ratio` times the activation between
    layers (whole, not sharded).
    `keeps_outputs`: a pipeline stage keeps what it sent until the backward pass of that micro-batch
    (torch), in addition to the buffer it receives into.
    """

    keeps_outputs: bool
    fixed_bytes: Quantity
    buffer_ratio: Quantity
    allocator_overhead_ratio: Quantity
    margin_ratio: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedError(Record):
    """Expected relative error of an uncalibrated prediction, as a ratio of the predicted value."""

    step_ratio: Quantity
    step_unmeasured_device_ratio: Quantity
    memory_ratio: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels(Record):
    """Which kernels run, against those of the trace.

    `fused_norms`: an RMS norm that a model writes out is one kernel. `memory_time_scale`,
    `scores_time_scale`, `attention_time_scale`: time over that of the traced kernels, of
    memory-bound ones, of those on attention scores (mask, softmax, dropout of unfused attention)
    and of fused attention. `gathers_input_again`: the backward pass gathers the input of
    column-parallel matrices once more, which is then kept by shards (Megatron), instead of keeping
    it whole (torch); null: a setting of each run, taken for kept where nobody says. `whole_tail`:
    sequence parallelism ends with the last layer, so that the norm behind it runs on all tokens.
    `joint_columns`: column-parallel matrices with one input are one matrix, so that its gradient is
    one product, and biases of row-parallel ones are added to a rank's tokens (Megatron).
    """

    not_zero: ClassVar = ("memory_time_scale", "scores_time_scale", "attention_time_scale")
    fused_norms: bool
    memory_time_scale: Quantity
    scores_time_scale: Quantity
    attention_time_scale: Quantity
    gathers_input_again: bool | None
    whole_tail: bool = False
    joint_columns: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Selective(Record):
    """What selective checkpointing means.

    `keeps_products`: the results of matrix products and attention kernels are kept, everything else
    is run again. `keeps_half_products`: of the products every second one, from the first on, and
    attention kernels. `recomputes_attention`: core attention is run again, from queries, keys and
    values to what they give, and its scores are not kept (Korthikanti et al. 2022, section 5). Each
    follows from the trace.
    """

    keeps_products: bool = False
    keeps_half_products: bool = False
    recomputes_attention: bool = False

    def __post_init__(self) -> None:
        if sum((self.keeps_products, self.keeps_half_products, self.recomputes_attention)) != 1:
            raise ValueError(
                "selective needs one of keeps_products, keeps_half_products "
                "and recomputes_attention"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedState(Record):
    """What of the states may live in host memory together, and when it comes by.

    Plans may offload these `items` from ZeRO level `offered_from` on. From `each_micro_batch_from`
    on they move in every micro-batch, below that (or where null) once a step.
    """

    items: tuple[StateItem, ...]
    offered_from: ZeroLevel
    each_micro_batch_from: ZeroLevel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading(Record):
    """What may be offloaded. A state that is null stays on the device.

    `by_layer`: whole layers have their weights and gradients offloaded together, so that the two
    ratios are one; otherwise a share of every layer. `activations`: a share of what layers save.
    `num_staged_layers`: layers whose share is on the device in passing. `bucket_bytes`: what the
    optimizer streams at a time of one fp32 state, once activations are gone (null: whole blocks,
    while they live). `optimizer_on_host`: the host's processor updates the offloaded part of the
    optimizer, so that none of it comes to the device. `host_overhead_ratio`: host memory beyond the
    states themselves, over their bytes.
    `pins_each_tensor`: torch's allocator pins tensors one by one, and rounds each up,
    except moments.
    """

    weights: HostedState | None
    grads: HostedState | None
    optimizer: HostedState | None
    activations: bool
    by_layer: bool
    num_staged_layers: Quantity
    bucket_bytes: Quantity | None = None
    optimizer_on_host: bool = False
    host_overhead_ratio: Quantity | None = None
    pins_each_tensor: bool = False

    def __post_init__(self) -> None:
        if self.by_layer and (self.weights is None or self.grads is None):
            raise ValueError("by_layer offloads weights and grads together: neither may be null")
        hosted = filter(None, (self.weights, self.grads, self.optimizer))
        items = [item for each in hosted for item in each.items]
        if twice := [item.value for item in StateItem if items.count(item) > 1]:
            raise ValueError(f"{' and '.join(twice)} would leave the device twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(Record):
    """The loss of a framework that does not run the model's own.

    Bytes for each logit of a rank: kept from the forward to the backward pass, alive at once at the
    most in either (the kept ones among them), and moved forward and backward together.
    `vocabulary_parallel`: whether tensor parallelism divides the logits.
    """

    kept_bytes_per_logit: Quantity
    peak_bytes_per_logit: Quantity
    moved_bytes_per_logit: Quantity
    vocabulary_parallel: bool

    def __post_init__(self) -> None:
        if self.peak_bytes_per_logit.value < self.kept_bytes_per_logit.value:
            raise ValueError("loss.peak_bytes_per_logit is less than kept_bytes_per_logit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs(Record):
    """What the runtime can do: ZeRO levels; whether tensor parallelism shards the sequence.

    `layer_split`: how it deals layers out to pipeline stages and their chunks when nobody says:
    "even", the first ones a layer longer; "equal", all the same number or not at all; "by_cost", by
    the parameters of layers and head. `schedules`: the pipeline schedules it has (none: one stage
    only). `tensor_parallel`: whether t > 1 is possible. `recomputes_some`: whether a stage may
    recompute some of its layers only. `uneven_layers`: whether it runs any split of the layers that
    a plan states, not only its own `layer_split`; `unlike_stages`: whether stages may differ in dp,
    tp, ZeRO level and recomputation. `fills_rounds`: whether an interleaved schedule takes only
    multiples of the stages as micro-batches. `precisions`: what it trains in. `mixes_selective`:
    whether some layers of a stage may be selective. `most_zero_with_tp`: the highest ZeRO level
    where t > 1. `partial_offload`: of which states a share may be offloaded, from which ZeRO level
    on, and of others all or nothing; None: of all. `weights_with_optimizer`: whether weights are
    offloaded only where the optimizer is too. `copies`: whether states that are divided may have
    copies (`dp_replicate`). `data_parallel`: whether dp > 1 is possible.
    """

    zero_levels: tuple[ZeroLevel, ...]
    sequence_parallel: bool
    layer_split: Literal["even", "equal", "by_cost"]
    schedules: tuple[ScheduleKind, ...]
    tensor_parallel: bool
    recomputes_some: bool
    uneven_layers: bool
    unlike_stages: bool
    fills_rounds: bool = False
    precisions: tuple[Precision, ...] = tuple(Precision)
    mixes_selective: bool = True
    most_zero_with_tp: ZeroLevel = 3
    partial_offload: Mapping[str, ZeroLevel] | None = None
    weights_with_optimizer: bool = False
    copies: bool = False
    data_parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading(Record):
    """Host memory of every rank while its weights are made.

    `part_bytes_per_param`: of its part of the largest parameter.
    """

    part_bytes_per_param: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime(Record):
    """One training framework.

    `loading`: null where it is not known. `converts_layers`: whether it trains layers that
    `mist.layers` converted.
    """

    schema: Literal["mist.runtime/1"]
    name: str
    what: str
    states: States
    transients: Transients
    traffic: StateTraffic
    host: HostLaunch
    overlap: Overlap
    memory: MemoryPolicy
    uncertainty: ExpectedError
    kernels: Kernels
    loss: Loss | None
    selective: Selective | None
    offload: Offloading | None
    knobs: Knobs
    loading: Loading | None = None
    converts_layers: bool = False

    def __post_init__(self) -> None:
        check_states(self.states, self.knobs.zero_levels)
        self._check_hosted()
        if missing := [word.value for word in Precision if word not in self.reduce_bytes]:
            raise ValueError(f"transients.reduce_bytes_per_param lacks {', '.join(missing)}")

    def _check_hosted(self) -> None:
        """Raise ValueError where plans may offload a state that has no bytes."""
        names, optimizers = ("weights", "grads", "optimizer"), optimizers_of(self.states)
        for precision, optimizer in product(Precision, optimizers):
            states = states_of(self.states, precision, optimizer)
            for name, zero in product(names, self.knobs.zero_levels):
                hosted = self.hosted(name)
                if hosted is None or zero < hosted.offered_from:
                    continue
                if not sum_states(states, zero, hosted.items).bytes_per_param(1):
                    raise ValueError(
                        f"offload.{name} has nothing to offload in {precision.value} at ZeRO-{zero}"
                    )

    @property
    def reduce_bytes(self) -> Mapping[Precision, Quantity]:
        """Gradient bytes per parameter of the group being reduced, by compute precision."""
        return self.transients.reduce_bytes_per_param

    def offloads(self, name: str) -> bool:
        """Whether "weights", "grads", "optimizer" or "activations" may live in host memory."""
        return self.offload is not None and bool(getattr(self.offload, name))

    def hosted(self, name: str) -> HostedState | None:
        """What of "weights", "grads" or "optimizer" may live in host memory; None: nothing."""
        return getattr(self.offload, name) if self.offload else None

    def hosted_items(self, name: str) -> tuple[StateItem, ...]:
        """The items of the states that leave the device with "weights", "grads" or "optimizer"."""
        hosted = self.hosted(name)
        return hosted.items if hosted else ()

    @property
    def keeps_results(self) -> bool:
        """Whether a layer that runs again may keep the results of any operations."""
        return self.selective is not None and self.selective.keeps_products

    @property
    def levels(self) -> tuple[MemoryLevel, ...]:
        """The memory levels that its layers may have."""
        return levels_that(lambda row: not row.meaning or bool(getattr(self, row.meaning)))

    def states_of(self, precision: Precision, optimizer: Optimizer) -> States:
        """The states of one precision and optimizer.

        Raises PlatformError when the moments of the optimizer are not known.
        """
        known = optimizers_of(self.states)
        if optimizer not in known:
            raise PlatformError(
                f"optimizer {optimizer.value}: runtime {self.name} has states of "
                f"{', '.join(known)} only. Add a row to `moments` of its profile."
            )
        return states_of(self.states, precision, optimizer)
