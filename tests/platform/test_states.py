"""States by item: sums against published tables, and what follows from the same rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from mist.errors import PlatformError
from mist.plans.workload import Optimizer, Precision
from mist.platform.profiles import Family, list_profiles, load_runtime
from mist.platform.states import StateItem, StateSum, sum_states
from tests.platform.samples import PROFILES

BF16, FP32 = Precision.BF16, Precision.FP32
# Bytes per parameter on every rank, and divided over ranks.
PUBLISHED = {
    # Megatron-LM, docs/user-guide/features/dist_optimizer.md: 18, distributed 6 + 12/d; fp32 16.
    ("megatron", BF16): {0: (18, 0), 1: (6, 12)},
    ("megatron", FP32): {0: (16, 0)},
    # DeepSpeed, memory.rst and LlamaFactory issue 1158 (docs/cost-model.md): 18/N at ZeRO-3.
    ("deepspeed-zero3", BF16): {1: (4, 12), 2: (2, 16), 3: (0, 18)},
    # Rajbhandari et al. 2020 (ZeRO), table 1: 2 + 2 + K = 12 with Adam, each stage divides one.
    ("mist-fp16", BF16): {0: (16, 0), 1: (4, 12), 2: (2, 14), 3: (0, 16)},
    # nanotron, optim/gradient_accumulator.py: an fp32 buffer of all gradients, which is never cut.
    ("nanotron", BF16): {0: (20, 0), 1: (8, 12)},
    ("torchtitan", BF16): {3: (0, 16)},
    ("fsdp1", BF16): {3: (0, 16)},
    ("torchtune", BF16): {0: (8, 0)},
}
# In host memory, of each parameter, at the highest ZeRO level: memory.rst says 16, 18 with weights.
HOSTED = {
    ("torch", BF16): {"weights": 4, "grads": 4, "optimizer": 8},
    ("torch", FP32): {"weights": 4, "grads": 4, "optimizer": 8},
    ("deepspeed-zero3", BF16): {"weights": 2, "grads": 0, "optimizer": 16},
    ("deepspeed-zero3", FP32): {"weights": 4, "grads": 0, "optimizer": 16},
    ("mist-fp16", BF16): {"weights": 2, "grads": 2, "optimizer": 12},
    ("megatron", BF16): {"weights": 0, "grads": 0, "optimizer": 0},
}


@pytest.mark.parametrize(("runtime", "precision"), PUBLISHED)
def test_sums_are_those_that_frameworks_publish(runtime: str, precision: Precision) -> None:
    states = load_runtime(runtime).profile.states_of(precision, Optimizer.ADAMW)
    for zero, (replicated, sharded) in PUBLISHED[runtime, precision].items():
        assert sum_states(states, zero) == StateSum(replicated=replicated, sharded=sharded)


@pytest.mark.parametrize(("runtime", "precision"), HOSTED)
def test_what_leaves_the_device_are_the_same_rows(runtime: str, precision: Precision) -> None:
    profile = load_runtime(runtime).profile
    states = profile.states_of(precision, Optimizer.ADAMW)
    top = max(profile.knobs.zero_levels)
    hosted = {
        name: sum_states(states, top, profile.hosted_items(name)).bytes_per_param(1)
        for name in ("weights", "grads", "optimizer")
    }
    assert hosted == HOSTED[runtime, precision]


@pytest.mark.parametrize("name", list_profiles(Family.RUNTIME))
def test_only_weights_are_left_of_a_frozen_parameter(name: str) -> None:
    """It has no gradient and no moments: never more than a trained one, whatever the row says."""
    runtime = load_runtime(name).profile
    for precision in Precision:
        states = runtime.states_of(precision, Optimizer.ADAMW)
        for zero in runtime.knobs.zero_levels:
            for item in (StateItem.GRADIENTS, StateItem.MOMENTS):
                nothing = StateSum(replicated=0.0, sharded=0.0)
                assert sum_states(states, zero, [item], frozen=True) == nothing
            frozen, trained = (sum_states(states, zero, frozen=each) for each in (True, False))
            assert 0 < frozen.bytes_per_param(8) < trained.bytes_per_param(8)


def test_a_row_is_of_what_it_names() -> None:
    (row,) = load_runtime("torch").profile.states[StateItem.MOMENTS]
    assert row.is_of(BF16, Optimizer.ADAMW)
    assert not replace(row, precisions=(FP32,)).is_of(BF16, Optimizer.ADAMW)
    assert not replace(row, optimizers=()).is_of(BF16, Optimizer.ADAMW)
    assert replace(row, optimizers=None).is_of(BF16, Optimizer.ADAMW)


def test_a_profile_of_sums_says_what_to_write_instead(tmp_path: Path) -> None:
    text = (PROFILES / "runtimes" / "torch.yaml").read_text()
    before, after = text.split("\nstates:\n")
    rest = after[after.index("\ntransients:") :]
    row = (
        "{precisions: [bf16], zero: 0, replicated_bytes_per_param: 18, sharded_bytes_per_param: 0}"
    )
    path = tmp_path / "old.yaml"
    path.write_text(f"{before}\nstates:\n  - {row}{rest}")
    with pytest.raises(PlatformError) as refusal:
        load_runtime(str(path))
    assert str(refusal.value) == (
        f"{path} has 1 fault:\n  states: is a list of sums, as profiles had before. Write rows by "
        "item instead (weights, master, gradients, moments), as `states` of "
        "profiles/runtimes/torch.yaml: each with bytes_per_param and sharded_from. "
        "frozen_shard_bytes_per_param is now frozen_bytes_per_param of a row, and offload names "
        "items"
    )
