"""What is priced: a model on a platform under a workload, with its stage cost bound to both."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mist.model.summary import ModelFacts
from mist.plans.numerics import NUMERICS
from mist.plans.workload import HeadMode, MemoryLevel, Workload
from mist.platform import OpCosts, Platform
from mist.platform.calibration import Profiles
from mist.rules.apply import as_applied
from mist.rules.combinations import rules_for
from mist.rules.rule import Rule
from mist.symbolic.columns import Placement
from mist.symbolic.program import ModelPrograms, StageModel, stage_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model on a platform under a workload, with its stage cost bound and its rules.

    `levels`, `heads`: the memory levels and ways to run the head that are priced. `cost` are the
    `programs` bound to the `laws`.
    `kind_prefix[k, x]`: how many of the first x layers are block k.
    """

    facts: ModelFacts
    programs: ModelPrograms
    levels: tuple[MemoryLevel, ...]
    heads: tuple[HeadMode, ...]
    laws: OpCosts
    platform: Platform
    workload: Workload
    cost: StageModel
    rules: tuple[Rule, ...]
    kind_prefix: NDArray[np.int64]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.facts.num_layers

    @property
    def placement(self) -> Placement:
        """The sequence and the nodes of its ranks."""
        return Placement(
            seq_len=self.workload.seq_len,
            gpus_per_node=self.platform.gpus_per_node,
            spans_nodes=self.platform.num_nodes > 1,
        )


def make_job(programs: ModelPrograms, platform: Platform, workload: Workload) -> Job:
    """Bind the programs of a model to a platform, for a workload."""
    facts = programs.facts
    platform = replace(platform, runtime=as_applied(platform.runtime, facts))
    is_kind = np.array(facts.layer_kinds()) == np.arange(facts.num_kinds)[:, None]
    laws = _laws(platform, workload)
    cost = stage_model(programs, laws)
    return Job(
        facts=facts,
        programs=programs,
        levels=programs.levels,
        heads=programs.heads,
        laws=laws,
        platform=platform,
        workload=workload,
        cost=cost,
        rules=rules_for(facts, platform, workload, cost.domain),
        kind_prefix=np.pad(is_kind.cumsum(axis=1), ((0, 0), (1, 0))),
    )


def on_profiles(job: Job, profiles: Profiles) -> Job:
    """The job where figures of its profiles are others, on the same machines: its rules stay."""
    device, cluster, profile = profiles
    runtime = as_applied(profile, job.facts)
    platform = replace(job.platform, device=device, cluster=cluster, runtime=runtime)
    laws = _laws(platform, job.workload)
    return replace(job, platform=platform, laws=laws, cost=stage_model(job.programs, laws))


def _laws(platform: Platform, workload: Workload) -> OpCosts:
    return OpCosts(
        device=platform.device,
        cluster=platform.cluster,
        runtime=platform.runtime,
        numerics=NUMERICS[workload.precision],
    )
