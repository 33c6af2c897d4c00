"""What Mist uses of torch that is not public, and which versions of torch have it.

Everything else is documented API. Tests look up every row, so that a release without one of them
fails by name; a feature whose rows are missing is refused by name, the others run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Final, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from mist.errors import ModelError
from mist.plans.plan import Plan
from mist.plans.workload import ScheduleKind

ALL: Final = "everything"
FSDP: Final = "torch.distributed.fsdp._fully_shard"
PIPELINING: Final = "torch.distributed.pipelining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """A name within a module of torch, there `since` a version.

    `feature`: of a plan, that needs it. `before`: what older versions have in its place, and Mist
    uses there. `argument`: that it must take.
    """

    module: str
    name: str
    feature: str
    since: str
    before: str | None = None
    argument: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether this torch has it, or what stood in its place before."""
        return any(self._has(name) for name in (self.name, self.before) if name)

    @property
    def words(self) -> str:
        """Its full name."""
        return f"{self.module}.{self.name}" + (f"({self.argument}=)" if self.argument else "")

    def _has(self, name: str) -> bool:
        try:
            value: Any = import_module(self.module)
        except ImportError:
            return False
        for part in name.split("."):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return self.argument is None or self.argument in signature(value).parameters


HOOKS: Final = (
    Hook(module=f"{FSDP}._fsdp_param_group", name="FSDPParamGroup.post_backward",
         feature=ScheduleKind.ZERO_BUBBLE, since="2.4"),
    Hook(module=f"{FSDP}._fsdp_state", name="FSDPState._root_post_backward_final_callback",
         feature=ALL, since="2.4"),
    Hook(module=f"{FSDP}._fully_shard", name="FSDPModule._get_fsdp_state", feature=ALL,
         since="2.6"),
    Hook(module=f"{PIPELINING}.schedules", name="_batch_p2p", feature="pipeline", since="2.6"),
    Hook(module=f"{PIPELINING}.stage", name="PipelineStage.backward_maybe_with_nosync",
         feature="pipeline", since="2.6"),
    Hook(module=f"{PIPELINING}.stage", name="PipelineStage.perform_reduce_grad",
         feature=ScheduleKind.ZERO_BUBBLE, since="2.10"),
    Hook(module=f"{PIPELINING}.stage", name="PipelineStage._setup_forward_recv_info",
         feature="pipeline", since="2.13", before="PipelineStage._prepare_forward_infra"),
    Hook(module=f"{PIPELINING}.stage", name="PipelineStage._setup_backward_recv_info",
         feature="pipeline", since="2.13", before="PipelineStage._prepare_backward_infra"),
    Hook(module="torch.distributed._composable.replicate_with_fsdp", name="replicate",
         feature="zero 0", since="2.10"),
    Hook(module="torch.distributed.tensor.placement_types", name="_StridedShard", feature=ALL,
         since="2.5"),
    Hook(module="torch.distributed.tensor", name="DTensor.from_local", feature="tp",
         since="2.13", argument="grad_placements"),
    Hook(module="torch.distributed.distributed_c10d", name="_abort_process_group", feature=ALL,
         since="2.6"),
    Hook(module="torch.distributed._functional_collectives", name="AsyncCollectiveTensor",
         feature=ALL, since="2.1"),
    Hook(module="torch._C._distributed_c10d", name="_resolve_process_group", feature=ALL,
         since="2.3"),
    Hook(module="torch.testing._internal.distributed.fake_pg", name="FakeStore", feature=ALL,
         since="2.1"),
    Hook(module="torch._subclasses.fake_tensor", name="FakeTensorMode", feature=ALL, since="2.0"),
    Hook(module="torch.utils._python_dispatch", name="TorchDispatchMode", feature=ALL,
         since="1.13"),
    Hook(module="torch.nn.init", name="_no_grad_trunc_normal_", feature=ALL, since="1.6"),
)  # fmt: skip


def missing() -> Iterator[Hook]:
    """What this torch does not have."""
    return (hook for hook in HOOKS if not hook.is_here)


def refuse_missing(plan: Plan) -> None:
    """Raise ModelError for a plan that needs what this torch does not have."""
    features = set(_features(plan))
    for hook in missing():
        if hook.feature in features:
            raise ModelError(
                f"this torch ({torch.__version__}) has no {hook.words}, which "
                f"{hook.feature} needs (it came with {hook.since}). Use a newer torch, or plan "
                f"without {hook.feature}."
            )


def _features(plan: Plan) -> Iterator[str]:
    yield ALL
    if len(plan.stages) > 1:
        yield "pipeline"
        yield plan.schedule.kind
    if any(stage.zero == 0 for stage in plan.stages):
        yield "zero 0"
    if any(stage.tp > 1 for stage in plan.stages):
        yield "tp"


Stage = TypeVar("Stage", bound=type[PipelineStage])


def known_by_older_names(stage: Stage) -> Stage:
    """A decorator: versions before 2.13 tell a stage what it receives by other names.

    They also look at what it gives: the last stage gives a loss, which they take for a mistake.
    """
    if not hasattr(PipelineStage, "_setup_forward_recv_info"):

        def forward(self: Any, num: int, *args: object, **kwargs: object) -> tuple[object, ...]:  # noqa: ANN401
            self._setup_forward_recv_info(num, has_backward=True)
            return ()

        def backward(self: Any, num: int) -> None:  # noqa: ANN401
            self._setup_backward_recv_info(num)

        def anything(self: object, *outputs: object) -> None:
            return None

        setattr(stage, "_prepare_forward_infra", forward)  # noqa: B010 (mypy: a method)
        setattr(stage, "_prepare_backward_infra", backward)  # noqa: B010
        setattr(stage, "_validate_fwd_outputs", anything)  # noqa: B010
    return stage


def param_groups(module: FSDPModule) -> list[Any]:
    """The groups of parameters that FSDP2 reduces together: one in versions before 2.13."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    groups = [getattr(state, "_fsdp_param_group", None)] if several is None else several
    return [group for group in groups if group is not None]
