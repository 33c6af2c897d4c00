"""What FSDP's streams keep apart: by the bytes of each, and against published peaks."""

import pytest

from tests.symbolic.test_runtime_fields import (
    HIDDEN,
    TORCH,
    held_params,
    stage,
    without_pools,
)

OVERHEAD = 1 + TORCH.memory.allocator_overhead_ratio.value
ENDS, LAYER = 2 * 32000 * HIDDEN / 2, 2 * HIDDEN * 4 * HIDDEN / 2 + HIDDEN  # on one of two ranks


@pytest.mark.parametrize(
    ("zero", "gradients", "flat"),
    [
        # Bytes per parameter of a rank of 8 that the pool of the reduce-scatter stream keeps while
        # no gradient lives, and parameters that were gathered into one flat buffer, bf16.
        (0, 4, 0.0),
        (1, 4 / 8, ENDS),
        (2, 0, ENDS),
        (3, 0, ENDS - LAYER),
    ],
)
def test_streams_keep_memory_apart(zero: int, gradients: float, flat: float) -> None:
    """Several micro-batches a step: from ZeRO-2 on gradients between them are live, and counted.

    So are those of a rank that divides nothing, as its last backward pass ends.
    """
    plain, pooled = stage(without_pools(TORCH), zero=zero), stage(TORCH, zero=zero)
    idle = gradients * held_params(2) + 2 * flat
    idle_last = idle if zero > 0 else 0
    for name, size in (("begin_bytes", idle), ("end_bytes", idle), ("last_bytes", idle_last)):
        assert pooled[name] - plain[name] == pytest.approx(OVERHEAD * size), name
    assert pooled["step_bytes"] - plain["step_bytes"] == pytest.approx(OVERHEAD * 2 * flat)
    parts = ("states", "activations", "working", "gathered", "buffers")
    assert [pooled[f"{part}_bytes"] for part in parts] == [plain[f"{part}_bytes"] for part in parts]
    live = pooled["peak_bytes"] - pooled["allocator_bytes"]
    assert live == pytest.approx(plain["peak_bytes"] - plain["allocator_bytes"])
