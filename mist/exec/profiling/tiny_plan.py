"""The plan of a model that is trained only to be timed: nothing is predicted in it."""

from typing import Final, Literal

import torch.distributed as dist

from mist.plans.memory_levels import KEEPS_ALL
from mist.plans.plan import (
    DEFAULT_SCHEDULE,
    ClusterRef,
    Estimate,
    ModelRef,
    Plan,
    Provenance,
    StageEstimate,
    Uncertainty,
)
from mist.plans.uniform_stages import stage_at
from mist.plans.workload import Attention, Optimizer, Precision, Workload

SAMPLES: Final = 2  # of a rank's micro-batch
SEQ_LEN: Final = 16

NOT_PREDICTED: Final = Estimate(
    step_s=1.0,
    tokens_per_s=1.0,
    mfu=0.0,
    bubble_s=0.0,
    stages=(
        StageEstimate(
            stable_s=1.0,
            delta_s=0.0,
            time_parts_s={},
            peak_bytes=1,
            usable_bytes=1,
            memory_parts_bytes={},
            host_bytes=0,
        ),
    ),
    uncertainty=Uncertainty(
        step_low_ratio=1.0, step_high_ratio=1.0, memory_ratio=0.0, calibrated=False, basis="none"
    ),
    op_costs=(),
    extrapolated=(),
    not_modelled=(),
)


def tiny_plan(num_layers: int, num_micro_batches: int, axis: Literal["dp", "tp"]) -> Plan:
    """One stage on all ranks, ZeRO-1 in fp32; the axis takes them all."""
    world = dist.get_world_size()
    stage = stage_at(
        {axis: world, "micro_batch": SAMPLES, "zero": 1},
        layers=((0, num_layers),),
        first_device=0,
        memory={KEEPS_ALL: num_layers},
        shards_sequence=True,
    )
    return Plan(
        model=ModelRef(source="object:tiny", name="tiny", params=1, fingerprint="tiny"),
        workload=Workload(
            seq_len=SEQ_LEN,
            global_batch=SAMPLES * stage.dp * num_micro_batches,
            precision=Precision.FP32,
            optimizer=Optimizer.ADAMW,
            attention=Attention.FLASH,
            compile=False,
        ),
        cluster=ClusterRef(name="here", device="here", num_gpus=world, gpus_per_node=world),
        runtime="torch",
        schedule=DEFAULT_SCHEDULE,
        num_micro_batches=num_micro_batches,
        stages=(stage,),
        estimate=NOT_PREDICTED,
        alternatives=(),
        excluded=(),
        provenance=Provenance(
            mist="", profiles={}, solver="none", gap=0.0, lower_bound_s=0.0, search={}
        ),
    )
