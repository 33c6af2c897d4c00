"""A user's own module as the subject of a plan."""

from collections.abc import Callable
from copy import deepcopy

from torch import nn

from mist.exec.build.empty_weights import empty_parameters
from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import Subject, subject_of
from mist.layers.own_checkpoints import switch_off
from mist.model.summary import ModelFacts
from mist.plans.plan import Plan
from mist.trace import TraceSetting, trace_model
from mist.trace.models.loader import LoadedModel


def subject_of_module(
    model: nn.Module,
    plan: Plan,
    make_batch: Callable[..., object] | None,
    loss: Callable[..., object] | None,
) -> tuple[Subject, ModelFacts]:
    """What `build` needs of a module, and the facts that tell whether the plan is for it.

    Parameters that have values keep them. Raises ModelError and TraceError.
    """
    workload = plan.workload
    setting = TraceSetting(
        precision=workload.precision, attention=workload.attention, seq_len=workload.seq_len
    )
    facts = trace_model(model, setting, make_batch=make_batch, loss=loss).facts
    values = {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}
    empty = _without_values(model)
    empty_parameters(empty)
    switch_off(empty)
    loaded = LoadedModel(module=empty, name=facts.name, make_batch=make_batch, loss=loss)
    subject = subject_of(loaded, examine(loaded, workload.seq_len), plan)
    return Subject(
        loaded=subject.loaded, structure=subject.structure, rules=subject.rules, values=values
    ), facts


def _without_values(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, without copying their values first."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return deepcopy(model, memo)
