"""What each field of a runtime does to a stage: by how much, against the platform's own laws."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from sympy import Integer

from mist.model.graph import B as SAMPLES
from mist.model.graph import ModelGraph, Op, S, T, TensorLayout
from mist.model.summary import Traffic
from mist.plans.numerics import NUMERICS
from mist.platform import Kind, OpCosts, Quantity, Runtime
from mist.platform.profiles import load_runtime
from mist.platform.runtime import Loss
from mist.symbolic import symbols as sym
from mist.symbolic.block import layer_cost
from mist.symbolic.columns import Placement, position_columns, strategy_columns
from mist.symbolic.compile import compile_model
from mist.symbolic.program import FIGURES, ModelPrograms, stage_model
from tests.fast_cases import first_fast
from tests.toys import adamw_setting, kept, pointwise, toy_graph, toy_platform

B, SEQ, HIDDEN, LAYERS, GPUS = 2, 2048, 1024, 4, 16
PLATFORM = toy_platform(GPUS)
TORCH = PLATFORM.runtime
TWO_NODES = Placement(seq_len=SEQ, gpus_per_node=8, spans_nodes=True)


def changed(path: str, value: object, runtime: Runtime = TORCH) -> Runtime:
    """A runtime with one field changed: "host.step_s"; numbers keep their source."""
    section, name = path.split(".")
    part: Any = getattr(runtime, section)
    if isinstance(value, float):
        value = replace(getattr(part, name), value=value)
    return replace(runtime, **{section: replace(part, **{name: value})})


WITHOUT_COPIES = changed("transients.token_copies", False)


def laws(runtime: Runtime = TORCH) -> OpCosts:
    return OpCosts(
        device=PLATFORM.device,
        cluster=PLATFORM.cluster,
        runtime=runtime,
        numerics=NUMERICS["bf16"],
    )


_COMPILED: list[tuple[ModelGraph, Runtime, ModelPrograms]] = []


def compiled(graph: ModelGraph, runtime: Runtime) -> ModelPrograms:
    """The programs of a graph under a runtime, which tests ask for more than once."""
    for known, under, programs in _COMPILED:
        if known == graph and under == runtime:
            return programs
    programs = compile_model(graph, adamw_setting(runtime))
    _COMPILED.append((graph, runtime, programs))
    return programs


def stage(
    runtime: Runtime = TORCH,
    *,
    tp: int = 2,
    zero: int = 1,
    pp: int = 1,
    graph: ModelGraph | None = None,
    shares: Mapping[str, float] = MappingProxyType({}),
    compiled_for: Runtime | None = None,
) -> dict[str, float]:
    """The first stage of a pipeline of toy layers on two nodes, by part."""
    dp = GPUS // (tp * pp)
    programs = compiled(graph or toy_graph((LAYERS,)), compiled_for or runtime)
    cost = stage_model(programs, laws(runtime))
    terms = cost.terms(
        strategy_columns(
            TWO_NODES, {"dp": dp, "tp": tp, "micro_batch": B, "zero": zero, **shares}, num_stages=pp
        )
    )
    devices = np.array([(i * dp * tp, dp * tp) for i in range(pp)])
    stages = position_columns(TWO_NODES, devices, LAYERS // pp, 8)
    position = {name: np.asarray(column)[0] for name, column in stages.items()}
    counts = {"none_0": LAYERS // pp, "selective_0": 0, "full_0": 0}
    return {
        name: float(value) for name, value in cost.stage({**terms, **position, **counts}).items()
    }


@pytest.mark.slow
def test_memory_bound_kernels_are_scaled_apart() -> None:
    plain, twice = stage(), stage(changed("kernels.memory_time_scale", 2.0))
    size = 4 * B * SEQ * HIDDEN  # of which sequence parallelism leaves half
    alone = laws().memory_s(size / 2, 1, Traffic.POINTWISE) + laws().memory_s(
        6 * B * SEQ * HIDDEN / 2, 1, Traffic.POINTWISE
    )
    assert twice["compute_s"] - plain["compute_s"] == pytest.approx(LAYERS * float(alone))
    assert stage(changed("kernels.scores_time_scale", 5.0)) == pytest.approx(plain)


@pytest.mark.slow
def test_kernels_on_scores_are_scaled_apart() -> None:
    graph = toy_graph((LAYERS,))
    (block,) = graph.blocks
    scores = replace(pointwise("forward", 4 * S**2), layout=TensorLayout.SHARDED)
    graph = replace(graph, blocks=(replace(block, ops=(scores, *block.ops)),))
    plain = stage(graph=graph)
    twice = stage(changed("kernels.scores_time_scale", 2.0), graph=graph)
    alone = float(laws().memory_s(4 * SEQ**2, 1, Traffic.POINTWISE))
    assert twice["compute_s"] - plain["compute_s"] == pytest.approx(LAYERS * alone)


def test_one_matrix_for_all_adds_no_gradients() -> None:
    """Additions of gradients are whole, or are not there; a bias's is of all tokens, or a share."""
    adds = replace(pointwise("backward", 6 * SAMPLES * S), layout=TensorLayout.PARTIAL)
    bias = replace(adds, layout=TensorLayout.GATHERED, traffic=Traffic.REDUCTION)
    bias = replace(bias, read_bytes=bias.traffic_bytes, written_bytes=Integer(HIDDEN))
    graph = toy_graph((LAYERS,))
    (block,) = graph.blocks

    def seconds(runtime: Runtime, *ops: Op) -> float:
        blocks = (replace(block, ops=(*block.ops, *ops)),)
        found, plain = (stage(runtime, graph=replace(graph, blocks=b)) for b in (blocks, (block,)))
        return (found["compute_s"] - plain["compute_s"]) / LAYERS

    def law(num_bytes: float, traffic: Traffic, num_kernels: int) -> float:
        return float(laws().memory_s(num_bytes, num_kernels, traffic))

    joint = changed("kernels.joint_columns", True)
    size = 6 * B * SEQ
    assert seconds(TORCH, adds) == pytest.approx(law(size, Traffic.POINTWISE, 1))
    assert seconds(joint, adds) == pytest.approx(0, abs=1e-12)
    assert seconds(TORCH, bias) == pytest.approx(law(size + HIDDEN, Traffic.REDUCTION, 1))
    assert seconds(joint, bias) == pytest.approx(law((size + HIDDEN) / 2, Traffic.REDUCTION, 1))


@pytest.mark.slow
def test_tensor_parallel_time_is_scaled() -> None:
    half = stage(changed("overlap.tensor_parallel_time_scale", 0.5, WITHOUT_COPIES))
    plain = stage(WITHOUT_COPIES)
    assert half["tp_s"] == pytest.approx(plain["tp_s"] / 2)


def test_each_tensor_parallel_collective_copies_tokens() -> None:
    """Of two samples: 2 gathers and a scatter in each pass of a toy layer, 2 in all at each end."""
    plain, without = stage(), stage(WITHOUT_COPIES)
    each = float(laws().memory_s(2 * 2 * B * SEQ * HIDDEN, 1, Traffic.POINTWISE))
    assert plain["tp_s"] - without["tp_s"] == pytest.approx((6 * LAYERS + 2 * 2) * each)


def test_gradients_may_be_sent_in_two_bytes() -> None:
    """A reduce-scatter is of two bytes a parameter then, of four (fp32) else."""
    two = Quantity(value=2.0, source="test", kind=Kind.SPEC)
    (block,) = toy_graph((LAYERS,)).blocks
    for runtime, each_bytes in ((TORCH, 4), (changed("traffic.reduced_bytes_per_param", two), 2)):
        cost = layer_cost(block, adamw_setting(runtime))
        (call,) = cost.scatter_s.atoms(sym.REDUCE_SCATTER)
        up, down, norm = (param.num_reals for param in block.params)
        assert call.args[0] == each_bytes * ((up + down) / T + norm)


def test_tensor_parallel_groups_leave_the_node() -> None:
    """Sixteen ranks on two nodes: the collectives are those of eight and eight."""
    size = 2 * B * SEQ * HIDDEN
    gather = float(laws().all_gather_s(size, 16, 8))
    scatter = float(laws().reduce_scatter_s(size, 16, 8))
    found = stage(WITHOUT_COPIES, tp=16)
    layers = LAYERS * (4 * gather + 2 * scatter)  # one part of a layer needs all tokens
    assert found["tp_s"] == pytest.approx(layers + 2 * (gather + scatter))


def test_launches_of_pipelines_that_span_nodes() -> None:
    runtime = changed("host.pipeline_launch_s", 1.0)
    assert stage(runtime, pp=1)["launch_s"] == pytest.approx(stage()["launch_s"])
    assert stage(runtime, pp=2, tp=1)["launch_s"] == pytest.approx(stage(pp=2, tp=1)["launch_s"])
    more = stage(runtime, pp=2)["launch_s"] - stage(pp=2)["launch_s"]
    assert more == pytest.approx(LAYERS / 2 * 2.0**TORCH.host.pipeline_launch_exponent.value)


@pytest.mark.slow
def test_times_once_a_micro_batch_and_once_a_step() -> None:
    plain = stage()
    each = stage(changed("host.micro_batch_launch_s", 0.25))
    assert each["stable_s"] - plain["stable_s"] == pytest.approx(0.25)
    assert each["lone_s"] - plain["lone_s"] == pytest.approx(0.25)
    once = stage(changed("host.step_s", 0.25))
    assert once["stable_s"] == pytest.approx(plain["stable_s"])
    assert once["lone_s"] - plain["lone_s"] == pytest.approx(0.25)


@pytest.mark.slow
def test_a_collective_that_nothing_hides_is_paid_whole() -> None:
    params = 2 * HIDDEN * 4 * HIDDEN / 2 + HIDDEN
    reduce = float(laws().all_reduce_s(4 * params, 8, 4))
    hidden = stage(changed("overlap.gradient_all_reduce_ratio", 1.0), zero=0)
    open_ = stage(changed("overlap.gradient_all_reduce_ratio", 0.0), zero=0)
    half = stage(changed("overlap.gradient_all_reduce_ratio", 0.5), zero=0)
    assert open_["lone_s"] > half["lone_s"] > hidden["lone_s"]
    alone = stage(changed("overlap.gradient_all_reduce_ratio", 0.0), zero=0, tp=2)
    assert alone["lone_s"] - alone["stable_s"] > LAYERS * reduce


def test_layers_share_a_collective() -> None:
    """Four layers in one pay its latency once."""
    together = stage(changed("overlap.layers_per_collective", 4.0), zero=3)
    assert together["lone_s"] < stage(zero=3)["lone_s"]
    params = 2 * HIDDEN * 4 * HIDDEN / 2 + HIDDEN
    each, all_four = (float(laws().all_gather_s(2 * n * params, 8, 4)) for n in (1, 4))
    assert all_four < 4 * each


@pytest.mark.slow
def test_a_loss_of_the_runtimes_own() -> None:
    number = TORCH.host.step_s
    loss = Loss(
        kept_bytes_per_logit=replace(number, value=10.0),
        peak_bytes_per_logit=replace(number, value=10.0),
        moved_bytes_per_logit=replace(number, value=60.0),
        vocabulary_parallel=True,
    )
    graph = toy_graph((LAYERS,))
    head = replace(graph.head, saved=(replace(kept(TensorLayout.SHARDED, 4 * B), module=""),))
    graph = replace(graph, head=replace(head, saved_single=head.saved, transient_bytes=()))
    logits = B * SEQ * 32000 / 2
    divided = stage(replace(TORCH, loss=loss), graph=graph)
    plain = stage(graph=graph)
    saved = divided["activations_bytes"] - plain["activations_bytes"]
    assert saved == pytest.approx(10 * logits - 4 * B, abs=1)
    moved = float(laws().memory_s(60 * logits, 1, Traffic.SOFTMAX))
    assert divided["compute_s"] - plain["compute_s"] == pytest.approx(moved, rel=1e-6)
    whole = stage(replace(TORCH, loss=replace(loss, vocabulary_parallel=False)), graph=graph)
    assert whole["activations_bytes"] - divided["activations_bytes"] == pytest.approx(10 * logits)


def without_pools(runtime: Runtime, *, root_group: bool = True) -> Runtime:
    """A runtime that keeps no memory for streams (`test_stream_pools.py` has what it keeps)."""
    transients = replace(
        runtime.transients, gradient_pool=False, gather_pool=False, root_group=root_group
    )
    return replace(runtime, transients=transients)


def without_root_group() -> Runtime:
    """Runtime torch without FSDP's groups, with a loss of 4 bytes a logit, 12 at its peak."""
    runtime, number = without_pools(TORCH, root_group=False), TORCH.host.step_s
    loss = Loss(
        kept_bytes_per_logit=replace(number, value=4.0),
        peak_bytes_per_logit=replace(number, value=12.0),
        moved_bytes_per_logit=replace(number, value=60.0),
        vocabulary_parallel=True,
    )
    return replace(runtime, loss=loss)


@pytest.mark.parametrize("root_group", first_fast([True, False]))
def test_a_loss_is_at_its_peak_while_no_layer_works(root_group: bool) -> None:
    """Layers of the toy work in less than the loss: what it holds is 12 bytes a logit, in all."""
    runtime = without_root_group()
    if root_group:
        runtime = replace(TORCH, loss=runtime.loss)
    less = replace(runtime.loss, peak_bytes_per_logit=runtime.loss.kept_bytes_per_logit)
    found, kept = stage(runtime), stage(replace(runtime, loss=less))
    logits = B * SEQ * 32000 / 2
    assert found["activations_bytes"] == kept["activations_bytes"]
    assert found["working_bytes"] > 8 * logits - 1 > kept["working_bytes"]
    if not root_group:
        assert found["working_bytes"] == pytest.approx(8 * logits)


def held_params(tp: int) -> float:
    """Parameters of the toy: layers, embedding and head."""
    return LAYERS * (2 * HIDDEN * 4 * HIDDEN / tp + HIDDEN) + 2 * 32000 * HIDDEN / tp


@pytest.mark.parametrize("root_group", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_of_the_optimizer_comes_when_activations_are_gone(
    zero: int, root_group: bool
) -> None:
    """The peak is that of the step, where it makes more than a backward pass holds."""
    made = changed("transients.optimizer_bytes_per_param", 400.0)
    found = stage(without_pools(made, root_group=root_group), zero=zero)
    shard = 8 if zero else 1
    states = found["states_bytes"] + found["buffers_bytes"] + 400 * held_params(2) / shard
    overhead = 1 + TORCH.memory.allocator_overhead_ratio.value
    assert found["peak_bytes"] == pytest.approx(overhead * states)
    assert found["step_bytes"] == pytest.approx(found["peak_bytes"])
    parts = ("states", "activations", "working", "gathered", "buffers", "allocator")
    assert sum(found[f"{part}_bytes"] for part in parts) == pytest.approx(found["peak_bytes"])


@pytest.mark.slow
def test_zero_3_may_step_by_groups_of_parameters() -> None:
    """A quarter of a rank's shard at a time; below ZeRO-3 all of it."""
    made = changed("transients.optimizer_bytes_per_param", 4000.0)
    group = replace(TORCH.host.step_s, value=held_params(2) / 8 / 4)
    some = replace(made, transients=replace(made.transients, optimizer_group_params=group))
    overhead = 1 + TORCH.memory.allocator_overhead_ratio.value
    spared = stage(made, zero=3)["peak_bytes"] - stage(some, zero=3)["peak_bytes"]
    assert spared == pytest.approx(overhead * 3000 * held_params(2) / 8)
    assert stage(made, zero=2)["peak_bytes"] == stage(some, zero=2)["peak_bytes"]


DEEPSPEED = load_runtime("deepspeed-zero3").profile


@pytest.mark.parametrize(
    ("zero", "shares", "device", "host"),
    [  # bytes per parameter of a rank of 8, by memory.rst and stage_1_and_2.py
        (1, {}, 4 + 12 / 8, 0),
        (2, {}, 2 + 16 / 8, 0),
        (3, {}, 18 / 8, 0),
        (2, {"optimizer": 1}, 2, 16 / 8),
        (3, {"optimizer": 1}, 2 / 8, 16 / 8),
        (3, {"optimizer": 0.5}, 10 / 8, 8 / 8),
    ],
)
def test_deepspeeds_states(zero: int, shares: dict[str, float], device: float, host: float) -> None:
    """On the device, and with the overhead that its documents ask for in host memory."""
    found = stage(DEEPSPEED, zero=zero, shares=shares)
    params, margin = held_params(2), DEEPSPEED.memory.margin_ratio.value
    assert found["states_bytes"] == pytest.approx(device * params)
    assert found["host_bytes"] / (1 - margin) == pytest.approx(1.5 * host * params)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeed_holds_one_more_fp32_partition_as_it_steps(zero: int) -> None:
    """LlamaFactory issue 1158: 4 bytes a parameter of the shard on top of the states."""
    found = stage(DEEPSPEED, zero=zero)
    assert found["step_bytes"] >= found["states_bytes"] + 4 * held_params(2) / 8
    away = stage(DEEPSPEED, zero=max(zero, 2), shares={"optimizer": 1})
    overhead = 1 + DEEPSPEED.memory.allocator_overhead_ratio.value
    assert away["step_bytes"] == pytest.approx(
        overhead * (away["states_bytes"] + away["buffers_bytes"])
    )


def test_deepspeed_with_weights_in_host_memory_leaves_one_gathered_layer() -> None:
    found = stage(DEEPSPEED, zero=3, shares={"optimizer": 1, "weights": 1})
    ends = 2 * 32000 * HIDDEN / 2  # embedding and head stay
    assert found["states_bytes"] == pytest.approx(2 * ends / 8, abs=1)


@pytest.mark.slow
def test_inputs_that_are_gathered_again_are_kept_by_shards() -> None:
    again = stage(changed("kernels.gathers_input_again", True, WITHOUT_COPIES))
    plain = stage(WITHOUT_COPIES)
    size = 2 * B * SEQ * HIDDEN
    assert plain["activations_bytes"] - again["activations_bytes"] == pytest.approx(
        LAYERS * size / 2 + 2 * SEQ * HIDDEN / 2  # of the shared table, too
    )
    gather = float(laws().all_gather_s(size, 2, 2))
    assert again["tp_s"] - plain["tp_s"] == pytest.approx((LAYERS + 1) * gather)


@pytest.mark.slow
def test_buffers() -> None:
    size = 2 * B * SEQ * HIDDEN
    kept, one = stage(pp=2), stage(changed("memory.keeps_outputs", False), pp=2)
    # The first of two stages receives one gradient, and holds 2 outputs; or none.
    assert kept["buffers_bytes"] == pytest.approx((1 + 2) * size / 2)
    assert one["buffers_bytes"] == pytest.approx(size / 2)
    own = stage(changed("memory.fixed_bytes", 1e9))
    assert own["buffers_bytes"] - stage()["buffers_bytes"] == pytest.approx(1e9)
    wide = stage(changed("memory.buffer_ratio", 3.0))
    assert wide["buffers_bytes"] - stage()["buffers_bytes"] == pytest.approx(3 * size)


def test_products_in_eight_bits() -> None:
    eight = replace(laws(), numerics=NUMERICS["fp8"])
    big = (1, 8192, 8192, 8192)
    assert 1.4 < float(laws().gemm_s(*big)) / float(eight.gemm_s(*big)) < 2
    bare = replace(PLATFORM.device, gemm_fp8=None)
    with pytest.raises(ValueError, match="has no law for products in fp8"):
        replace(laws(), device=bare, numerics=NUMERICS["fp8"])


def test_where_the_host_is_the_device_launches_come_on_top() -> None:
    """Forward and backward: the whole of a layer's launches, however long the device takes."""
    ahead, behind = stage(tp=1), stage(changed("host.launch_ahead_ratio", 0.0), tp=1)
    launches = LAYERS * TORCH.host.layer_launch_s.value
    assert behind["launch_s"] == pytest.approx(launches)
    assert behind["stable_s"] - ahead["stable_s"] == pytest.approx(launches - ahead["launch_s"])


def test_programs_serve_every_value_of_a_calibrated_figure() -> None:
    """Compiled for other values, bound to these: nothing of the others is left in a program."""
    other, runtime = TORCH, TORCH
    for number, path in enumerate(FIGURES, start=1):
        other, runtime = changed(path, 0.5, other), changed(path, 0.01 * number, runtime)
    assert stage(runtime, pp=2, compiled_for=other) == pytest.approx(stage(runtime, pp=2))
    assert stage(other, pp=2) != pytest.approx(stage(runtime, pp=2))


def test_what_a_runtime_does_not_do_costs_programs_nothing() -> None:
    programs = compiled(toy_graph((LAYERS,)), changed("host.step_s", 0.0))
    assert "runtime_host_layer_launch_s()" in programs.terms.source
    assert "runtime_host_step_s()" not in programs.stage.source
